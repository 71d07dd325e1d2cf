//! Steps that ranks run together, each with a GPU of its own: kernels of the plan or NCCL exchange what lies in their pools, in the order
//! of the stream.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::CudaExecutor;
use super::libraries::Call;
use super::peers::Peers;
use super::program::{Ready, offset};
use crate::cuda::{Communicator, Exchange, Part, Stream, UniqueId};
use crate::plan::{Collective, CollectiveKind, DType, Program, Ref, Step, collectives, exchanges_of};
use crate::runtime::cuda::Graphs;
use crate::runtime::group::{Echo, Group, Mates};

/// What a step of a plan is on the stream.
#[derive(Clone, Debug)]
pub(super) enum Task {
    /// A kernel.
    Launch(Ready),
    /// An exchange of parts of the pool with the other ranks.
    Exchange(Exchange, Vec<Part>),
    /// A library's call.
    Library(Call),
}

impl Task {
    /// The kernel, if it is one.
    pub(super) fn ready(&self) -> Option<&Ready> {
        match self {
            Task::Launch(ready) => Some(ready),
            Task::Exchange(..) | Task::Library(_) => None,
        }
    }
}

/// The exchange that a collective of a bucket is.
pub(super) fn exchange(program: &Program, bucket: usize, step: &Step, collective: &Collective) -> Result<Task> {
    let kind = match collective.kind {
        CollectiveKind::AllGather => Exchange::AllGather,
        CollectiveKind::AllToAll => Exchange::AllToAll,
        CollectiveKind::Send(to) => Exchange::Send(usize::try_from(to)?),
        CollectiveKind::Receive(from) => Exchange::Receive(usize::try_from(from)?),
    };
    let at = |list: &[Ref], i: usize| -> Result<usize> {
        let place = list.get(i).with_context(|| format!("step {} has no part {i}", step.name))?;
        Ok(usize::try_from(offset(program, bucket, *place)?)?)
    };
    let part = |(i, (dtype, count)): (usize, &(DType, u64))| {
        let bytes = count.checked_mul(dtype.bytes()).context("a part that overflows")?;
        let bytes = usize::try_from(bytes)?;
        Ok(match collective.kind {
            CollectiveKind::AllGather | CollectiveKind::AllToAll => {
                Part { from: at(&step.reads, i)?, to: at(&step.writes, i)?, bytes }
            }
            CollectiveKind::Send(_) => {
                let from = at(&step.reads, i + collective.kind.first_read())?;
                Part { from, to: from, bytes }
            }
            CollectiveKind::Receive(_) => {
                let to = at(&step.writes, i)?;
                Part { from: to, to, bytes }
            }
        })
    };
    Ok(Task::Exchange(kind, collective.parts.iter().enumerate().map(part).collect::<Result<_>>()?))
}

/// How ranks are to exchange; all of them the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Road {
    /// Through each other's memory where all GPUs are of one host and reach it, else by NCCL.
    #[default]
    Auto,
    /// Through each other's memory, or not at all.
    Peer,
    /// By NCCL.
    Nccl,
}

/// The ranks that run steps together with this one.
pub(super) struct Others {
    mates: Mates,
    /// Of all ranks.
    all: Way,
    /// Of those of a stage, where these are others and exchange.
    stage: Option<Way>,
}

/// How they exchange.
enum Way {
    Peers(Peers),
    /// With why it is not through memory.
    Nccl(Communicator, String),
}

impl Others {
    /// What all ranks agree through.
    pub(super) fn group(&mut self) -> &mut dyn Group {
        self.mates.all()
    }

    fn ways(&self) -> impl Iterator<Item = &Way> {
        std::iter::once(&self.all).chain(&self.stage)
    }

    /// What has gone wrong between the GPUs, if anything has.
    pub(super) fn check(&self) -> Result<()> {
        self.ways().try_for_each(|way| match way {
            // One that is no more is for the watch to find.
            Way::Peers(_) => Ok(()),
            Way::Nccl(communicator, _) => Ok(communicator.check()?),
        })
    }
}

impl Way {
    /// In words.
    fn text(&self) -> String {
        match self {
            Way::Peers(_) => "through each other's memory".into(),
            Way::Nccl(communicator, why) => {
                let version = communicator.version().unwrap_or_default();
                format!("by NCCL {version} ({why})")
            }
        }
    }
}

/// How long steps may take that are still on the device when nobody waits for their results any more.
const PATIENCE: Duration = Duration::from_secs(1);

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        let Some(others) = self.others.take() else { return };
        // Other ranks may need this one for steps whose results they wait for. If they are no more, nothing ends by itself.
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE && matches!(self.stream().is_done(), Ok(false)) {
            sleep(PATIENCE / 1000);
        }
        let captured = std::mem::take(&mut self.captured);
        let mut end: Box<dyn FnOnce()> = Box::new(|| drop(captured));
        for way in std::iter::once(others.all).chain(others.stage) {
            let work = end;
            end = match way {
                Way::Peers(peers) => {
                    peers.give_up();
                    Box::new(move || {
                        work();
                        drop(peers);
                    })
                }
                Way::Nccl(communicator, _) => Box::new(move || communicator.end(work)),
            };
        }
        end();
    }
}

impl CudaExecutor {
    /// Makes the rank one of a group, with which it runs the plan's collectives: maps the others' memory, or joins them by NCCL and runs each
    /// kind of exchange once, because that makes connections when it first needs them, which cannot be captured; and where a stage has
    /// several ranks, the same with these. All ranks of the group call it at the same time; no step is in flight. The arena's contents are
    /// lost.
    ///
    /// # Errors
    /// The group is not one of the plan's ranks, or the GPUs cannot reach each other.
    pub fn with_group(mut self, group: Box<dyn Group>, road: Road) -> Result<Self> {
        let mut mates = Mates::new(group, self.rank, &self.manifest)?;
        let all = self.join(mates.all(), road)?;
        let stage = match mates.stage() {
            // The ranks of a stage have the same exchanges.
            Some(stage) if exchanges_of(self.program(), stage.size() as u64).next().is_some() => {
                Some(self.join(stage, road)?)
            }
            _ => None,
        };
        let others = Others { mates, all, stage };
        let by_nccl = others.ways().any(|way| matches!(way, Way::Nccl(..)));
        self.others = Some(others);
        // Whether steps are captured is a matter of all ranks, so none may go on without a graph by itself.
        if self.graphs == Graphs::Lazy {
            self.graphs = Graphs::Required;
        }
        if by_nccl {
            self.connect()?;
        }
        Ok(self)
    }

    /// Has the rank exchange with itself, by the kernels that exchange through memory: for measurements of one rank's steps without the
    /// others. Rows that are others' are this rank's again, so what comes out means nothing.
    ///
    /// # Errors
    /// A plan of one rank, or one whose ranks send to each other alone, or the device failed.
    pub fn looped(mut self) -> Result<Self> {
        let ranks = self.manifest.ranks.len();
        let alone = collectives(self.program()).all(|collective| collective.kind.peer().is_none());
        ensure!(
            ranks > 1 && alone,
            "one rank by itself: expected ranks that all exchange with all, found {}; compile the plan with --ranks expert=M alone",
            if alone { "a plan of one" } else { "some that send to each other alone" }
        );
        let kernel = |role| self.kernels.service(role);
        let peers = Peers::looped((self.program(), kernel), &self.device, (self.rank, ranks))?;
        let mates = Mates::new(Box::new(Echo::new(self.rank, ranks)), self.rank, &self.manifest)?;
        self.others = Some(Others { mates, all: Way::Peers(peers), stage: None });
        Ok(self)
    }

    /// Finds a way for the exchanges of so many ranks as a group has.
    fn join(&self, group: &mut dyn Group, road: Road) -> Result<Way> {
        let kernels = &self.kernels;
        let joined = Peers::join((self.program(), |role| kernels.service(role)), &self.device, group, road)?;
        Ok(match joined {
            Ok(peers) => Way::Peers(peers),
            Err(why) if road == Road::Peer => bail!(
                "--exchange peer: expected GPUs of one host that reach each other's memory, found that they do not: {why}; use --exchange \
                 nccl"
            ),
            Err(why) => {
                let id = agree_on_id(group)?;
                Way::Nccl(Communicator::new(&self.device, id, group.rank(), group.size())?, why)
            }
        })
    }

    /// How the rank exchanges with others, for a person; none of a plan of one rank.
    pub fn exchanges(&self) -> Option<String> {
        let others = self.others.as_ref()?;
        let of_stage = others.stage.as_ref().map(|way| format!("; within a stage {}", way.text()));
        Some(others.all.text() + &of_stage.unwrap_or_default())
    }

    /// Runs each exchange of the program's buckets once, those of the same ranks and sizes together. Both ends of one leave out the same ones, so
    /// there is still an order of all of them with which that of every rank agrees.
    fn connect(&self) -> Result<()> {
        let mut known: Vec<(Exchange, Vec<usize>)> = vec![];
        for task in self.tasks.iter().flatten() {
            let Task::Exchange(kind, parts) = task else { continue };
            let sizes = (*kind, parts.iter().map(|part| part.bytes).collect());
            if !known.contains(&sizes) {
                self.exchange(*kind, parts, self.stream(), false)?;
                known.push(sizes);
            }
        }
        Ok(self.stream().synchronize()?)
    }

    /// Queues an exchange, or has it captured: as a dependent launch if told so, where it is a launch. Whether it is one, which what follows
    /// may depend on.
    pub(super) fn exchange(&self, kind: Exchange, parts: &[Part], stream: &Stream, dependent: bool) -> Result<bool> {
        let size = self.manifest.ranks.len();
        let others = self.others.as_ref().with_context(|| {
            format!("collectives: expected {size} ranks, as the plan has, found one; start it with `mpirun -n {size}`")
        })?;
        let way = match (&others.stage, kind) {
            (Some(stage), Exchange::AllGather | Exchange::AllToAll) => stage,
            _ => &others.all,
        };
        match way {
            Way::Peers(peers) => peers.lines().exchange(kind, parts, self.pool.address(), stream, dependent)?,
            Way::Nccl(communicator, _) => communicator.exchange(kind, parts, &self.pool, stream)?,
        }
        Ok(matches!(way, Way::Peers(_)))
    }
}

/// The id of a communicator of the group's ranks, which the first of them makes.
fn agree_on_id(group: &mut dyn Group) -> Result<UniqueId> {
    let own = if group.rank() == 0 { UniqueId::new() } else { Ok(UniqueId::from_bytes([0; UniqueId::BYTES])) };
    // A rank that has none tells so, instead of leaving the others waiting for it.
    let sent = own.as_ref().map_or([0; UniqueId::BYTES], |id| id.to_bytes());
    let mut all = vec![0; group.size() * UniqueId::BYTES];
    group.all_gather(&sent, &mut all)?;
    own?;
    let first = *all.first_chunk().context("an id of other ranks")?;
    ensure!(first != [0; UniqueId::BYTES], "rank 0 of the group has no NCCL id; it says why");
    Ok(UniqueId::from_bytes(first))
}
