//! Steps into streams: one stream for a chain, another for each branch that runs beside it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::collective::Task;
use crate::cuda::{Device, DeviceMemory, Event, Exchange, Graph, Part, Stream};
use crate::plan::Step;

/// Branches that run side by side, at most; more go one after the other.
const MOST_STREAMS: usize = 4;

/// Queues an exchange of parts of the pool with the other ranks on a stream, if told so as a dependent launch where it is one; whether
/// what follows it may be a dependent launch.
type Queue<'a> = &'a dyn Fn(Exchange, &[Part], &Stream, bool) -> Result<bool>;

/// The streams that steps are queued on; the first is the one that everything else waits for.
pub(super) struct Streams {
    list: Vec<Stream>,
}

/// A captured bucket.
#[derive(Debug)]
pub struct Captured {
    pub(super) graph: Graph,
    /// Time to capture and instantiate it.
    pub elapsed: Duration,
    /// Device memory that it took.
    pub bytes: u64,
}

impl Captured {
    /// Nodes of the graph.
    pub fn nodes(&self) -> usize {
        self.graph.nodes
    }
}

/// On which stream each step runs, and for which steps of others it waits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Lanes {
    /// For each step its stream and the steps whose events it waits for.
    steps: Vec<(usize, Vec<usize>)>,
    /// For each stream but the first its last step, for which the first waits at the end.
    ends: Vec<usize>,
    /// Whether a step's event is waited for.
    recorded: Vec<bool>,
}

impl Lanes {
    /// Lanes for steps with these dependencies, each on earlier steps. A step goes on where the last of its dependencies ran, if
    /// that was the end of the stream; else it begins another branch.
    pub(super) fn new(after: &[&[u32]]) -> Lanes {
        let mut ends: Vec<usize> = vec![];
        let mut steps: Vec<(usize, Vec<usize>)> = vec![];
        let mut recorded = vec![false; after.len()];
        for (i, list) in after.iter().enumerate() {
            let list: Vec<usize> = list.iter().map(|&step| step as usize).collect();
            let continued = ends.iter().position(|end| list.contains(end));
            let lane = match continued {
                Some(lane) => lane,
                None if ends.len() < MOST_STREAMS => {
                    ends.push(usize::MAX);
                    ends.len() - 1
                }
                // Waiting for more than is needed is safe.
                None => i % MOST_STREAMS,
            };
            // In its own stream, everything before it is done.
            let waits: Vec<usize> = list.into_iter().filter(|&step| steps[step].0 != lane).collect();
            waits.iter().for_each(|&step| recorded[step] = true);
            steps.push((lane, waits));
            ends[lane] = i;
        }
        let first = ends.first().copied();
        let ends: Vec<usize> = ends.into_iter().filter(|end| Some(*end) != first).collect();
        ends.iter().for_each(|&step| recorded[step] = true);
        Lanes { steps, ends, recorded }
    }

    /// Lanes of a bucket's steps.
    pub(super) fn of(steps: &[Step]) -> Lanes {
        Lanes::new(&steps.iter().map(|step| &step.after[..]).collect::<Vec<_>>())
    }
}

impl Streams {
    pub(super) fn new(device: &Arc<Device>) -> Result<Streams> {
        let list = (0..MOST_STREAMS).map(|_| Stream::new(device)).collect::<Result<_, _>>()?;
        Ok(Streams { list })
    }

    /// The stream that all work begins and ends on.
    pub(super) fn main(&self) -> &Stream {
        &self.list[0]
    }

    /// Queues steps as their lanes say. Streams other than the first begin by waiting for it, and it ends by waiting for them.
    pub(super) fn queue(&self, tasks: &[Task], lanes: &Lanes, pool: &DeviceMemory, exchange: Queue) -> Result<()> {
        let device = self.main().device();
        let mut events: Vec<Option<Event>> = vec![];
        events.resize_with(tasks.len(), || None);
        let mut begun = [false; MOST_STREAMS];
        begun[0] = true;
        // Whether a stream ends with what no dependent launch may follow.
        let mut whole = [false; MOST_STREAMS];
        for (i, (task, (lane, waits))) in tasks.iter().zip(&lanes.steps).enumerate() {
            let stream = &self.list[*lane];
            let mut alone = true;
            if !begun[*lane] {
                begun[*lane] = true;
                let event = Event::new(device, false)?;
                event.record(self.main())?;
                stream.wait(&event)?;
                alone = false;
            }
            for &other in waits {
                if let Some(event) = &events[other] {
                    stream.wait(event)?;
                    alone = false;
                }
            }
            // A dependent launch waits for the kernel before it in its stream, and only for that. The first begins when all that
            // was queued before is done, which early reads of the others rely on. What follows an exchange that is no launch, or a
            // library's call, begins when that is done.
            let dependent = alone && i > 0 && !whole[*lane];
            whole[*lane] = false;
            match task {
                Task::Launch(ready) if dependent => ready.launch(stream)?,
                Task::Launch(ready) => ready.launch_after_all(stream)?,
                Task::Exchange(kind, parts) => whole[*lane] = !exchange(*kind, parts, stream, dependent)?,
                Task::Library(call) => {
                    call.queue(pool, stream)?;
                    whole[*lane] = true;
                }
            }
            if lanes.recorded[i] {
                let event = Event::new(device, false)?;
                event.record(stream)?;
                events[i] = Some(event);
            }
        }
        for &end in &lanes.ends {
            if let Some(event) = &events[end] {
                self.main().wait(event)?;
            }
        }
        Ok(())
    }

    /// Captures what `work` queues on the main stream.
    pub(super) fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Captured> {
        let started = Instant::now();
        let (before, _) = self.main().device().memory()?;
        let graph = Graph::capture(self.main(), work)?;
        self.main().synchronize()?;
        let (after, _) = self.main().device().memory()?;
        Ok(Captured { graph, elapsed: started.elapsed(), bytes: before.saturating_sub(after) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_stays_in_one_stream_without_events() {
        let lanes = Lanes::new(&[&[], &[0], &[1], &[0, 2]]);
        assert_eq!(lanes.steps, [(0, vec![]), (0, vec![]), (0, vec![]), (0, vec![])]);
        assert!(lanes.ends.is_empty() && !lanes.recorded.contains(&true));
    }

    #[test]
    fn a_branch_forks_and_joins() {
        // 0 feeds 1 and 2, both feed 3.
        let lanes = Lanes::new(&[&[], &[0], &[0], &[1, 2]]);
        assert_eq!(lanes.steps, [(0, vec![]), (0, vec![]), (1, vec![0]), (0, vec![2])]);
        assert_eq!((&lanes.ends[..], &lanes.recorded[..]), (&[2][..], &[true, false, true, false][..]));
    }
}
