//! What the ranks other than 0 do: they run what rank 0 gives them.

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::message::Ended;
use super::{Message, NAP, Ranks, Summary, unexpected};
use crate::runtime::{Executor, Finished, Generator, Next, Options, Request, RequestError, Scheduler, Work};

/// How often rank 0 is told how much is left, if no result tells it.
const REPORT: Duration = Duration::from_millis(20);

/// What rank 0 wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// To load the weights of a plan, and say so.
    Load(usize),
    /// To run requests, with a generator of these options.
    Round(Options),
    /// To leave.
    Stop,
}

/// Sees the tokens of one sequence and says after which it stops.
pub type Stop<'t> = Box<dyn FnMut(u32) -> Result<bool> + 't>;

/// Waits for the next order.
///
/// # Errors
/// The transport failed, or rank 0 says something else.
pub fn next_order(ranks: &mut Ranks) -> Result<Order> {
    match ranks.wait()? {
        (0, Message::Load(plan)) => Ok(Order::Load(plan)),
        (0, Message::Round(wanted)) => Ok(Order::Round(wanted.into())),
        (0, Message::Stop) => Ok(Order::Stop),
        (from, other) => bail!(unexpected(&ranks.peers()[from], "an order", &other)),
    }
}

/// Runs the requests of a round; `stopper` makes what decides about the texts that end one.
///
/// # Errors
/// The executor or the transport failed, or `stopper` did.
pub fn follow<'t, E: Executor + ?Sized>(
    ranks: &mut Ranks,
    generator: &mut Generator<'_, E>,
    stopper: impl FnMut(&[String]) -> Result<Stop<'t>>,
) -> Result<()> {
    let mut work = Follow {
        ranks,
        stopper,
        queue: VecDeque::new(),
        closed: false,
        received: 0,
        given: 0,
        numbers: BTreeMap::new(),
        stops: BTreeMap::new(),
        fault: None,
        sequences: 0,
        reported: Instant::now(),
        to_report: true,
    };
    generator.run(&mut work)?;
    let sequences = work.sequences;
    ranks.send(0, &Message::Summary(Summary { sequences, statistics: generator.statistics().clone() }))
}

/// Work that rank 0 gives.
struct Follow<'r, 't, S> {
    ranks: &'r mut Ranks,
    stopper: S,
    queue: VecDeque<(u64, Request)>,
    closed: bool,
    received: u64,
    /// Requests given to the generator.
    given: usize,
    /// By the generator's index: the request's number in the round.
    numbers: BTreeMap<usize, u64>,
    /// By the request's id, for those that a text may end.
    stops: BTreeMap<u64, Stop<'t>>,
    /// Why it is not known whether a sequence stops.
    fault: Option<anyhow::Error>,
    sequences: u64,
    reported: Instant,
    /// Something has changed since.
    to_report: bool,
}

impl<'t, S: FnMut(&[String]) -> Result<Stop<'t>>> Follow<'_, 't, S> {
    /// Takes what has come; says whether anything did.
    fn hear(&mut self) -> Result<bool> {
        let mut came = false;
        while !self.closed
            && let Some((from, message)) = self.ranks.receive()?
        {
            came = true;
            match message {
                Message::Job(job) => {
                    let number = job.number;
                    let (request, stops) = job.into_request();
                    if !stops.is_empty() {
                        self.stops.insert(request.id, (self.stopper)(&stops)?);
                    }
                    self.received += 1;
                    self.queue.push_back((number, request));
                }
                Message::Close => self.closed = true,
                other => bail!(unexpected(&self.ranks.peers()[from], "a request", &other)),
            }
        }
        Ok(came)
    }
}

impl<'t, S: FnMut(&[String]) -> Result<Stop<'t>>> Work for Follow<'_, 't, S> {
    fn next(&mut self) -> Result<Option<Request>> {
        bail!("work of several ranks is polled; this is a bug")
    }

    fn poll(&mut self, idle: bool) -> Result<Next> {
        let came = self.hear()?;
        if let Some((number, request)) = self.queue.pop_front() {
            self.numbers.insert(self.given, number);
            self.given += 1;
            return Ok(Next::Request(request));
        }
        if self.closed {
            return Ok(Next::End);
        }
        if idle && !came {
            sleep(NAP);
        }
        Ok(Next::Later)
    }

    fn turn(&mut self, scheduler: &Scheduler) -> Result<()> {
        self.hear()?;
        if self.to_report || (!scheduler.is_idle() && self.reported.elapsed() >= REPORT) {
            let waiting: usize = self.queue.iter().map(|(_, request)| request.rows()).sum();
            let remaining = (scheduler.remaining_rows() + waiting) as u64;
            self.ranks.send(0, &Message::Report { received: self.received, remaining })?;
            (self.reported, self.to_report) = (Instant::now(), false);
        }
        Ok(())
    }

    fn token(&mut self, id: u64, token: u32) -> ControlFlow<()> {
        match self.stops.get_mut(&id).map(|stop| stop(token)) {
            None | Some(Ok(false)) => ControlFlow::Continue(()),
            Some(Ok(true)) => ControlFlow::Break(()),
            Some(Err(fault)) => {
                self.fault.get_or_insert(fault);
                ControlFlow::Break(())
            }
        }
    }

    fn finished(&mut self, index: usize, result: Result<Finished, RequestError>) -> Result<()> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let number = self.numbers.remove(&index).context("a result of no request; this is a bug")?;
        // Rank 0 has checked it, by the same plan.
        let finished = result.with_context(|| format!("request {number} of rank 0"))?;
        self.stops.remove(&finished.id);
        self.sequences += 1;
        self.to_report = true;
        self.ranks.send(0, &Message::Ended(Ended::new(number, finished)))
    }
}
