//! A command among the ranks of `mpirun`, or alone, which is the usual case and costs nothing.

use anyhow::{Result, bail};

use crate::cli::device::{Device, Neighbours, Place, RankArguments, Weights};
use crate::cli::output::{describe, note};
use crate::cli::table::table;
use crate::cli::{is_usage, usage};
use crate::cuda;
use crate::plan::PlanFile;
use crate::runtime::ranks::{
    self, HostRanks, Introduction, Message, Mode, Order, Peer, Ranks, Summary, next_order, own_gpu,
};
use crate::runtime::{Executor, Generator, Options, Work};

/// The ranks of which this process is one, or nothing.
pub struct World {
    ranks: Option<Ranks>,
}

impl World {
    /// Joins the ranks that a launcher has started.
    ///
    /// # Errors
    /// It has started several, and this binary was built without MPI.
    pub fn join() -> Result<World> {
        match ranks::join(|text| note(format_args!("lfm2c: {text}"))) {
            Ok(ranks) => Ok(World { ranks }),
            Err(error) => usage_of_all(error.to_string()),
        }
    }

    /// No ranks.
    pub fn alone() -> World {
        World { ranks: None }
    }

    /// Refuses to run a command several times over.
    ///
    /// # Errors
    /// A launcher has started several processes.
    pub fn refuse(command: &str) -> Result<()> {
        match ranks::launched() {
            None => Ok(()),
            Some(launched) => usage_of_all(format!(
                "lfm2c {command}: expected one process, found {} = {}; only `run`, without --count-experts, and \
                 `bench` work on several ranks",
                launched.by, launched.size
            )),
        }
    }

    /// The ranks, if this one is not rank 0.
    pub fn follower(&mut self) -> Option<&mut Ranks> {
        self.ranks.as_mut().filter(|ranks| ranks.rank() > 0)
    }

    /// Sees to it that all ranks have the same plans and devices, and each a GPU of its own if plans run on GPUs, or the same as no more ranks than may:
    /// tells which.
    ///
    /// # Errors
    /// They have not, or the plans are not for so many ranks.
    pub fn agree(&mut self, plans: &[PlanFile], device: Device, arguments: RankArguments) -> Result<Place> {
        let Some(ranks) = &mut self.ranks else { return Ok(device.into()) };
        let on_gpu = plans.iter().any(|plan| device.is_cuda(&plan.manifest));
        if !on_gpu && arguments.weights == Weights::Share {
            return usage(
                "--weights share: expected ranks on GPUs, found the CPU, where each rank reads what others of its host have read from memory; \
                 leave it out",
            );
        }
        // All ranks of the host tell what they see, whatever they run on: the others wait for it.
        let seen = if on_gpu { cuda::Device::names()? } else { vec![] };
        let host = ranks.host();
        let own = |host: HostRanks| own_gpu(&mut *host.borrow_mut(), seen, arguments.ranks_per_gpu.get());
        let gpu = host.clone().map_or(Ok(0), own)?;
        // Where there is none, opening it says why.
        let name = if on_gpu { cuda::Device::open(gpu)?.name.clone() } else { "the CPU".to_owned() };
        let neighbours = host.map(|host| Neighbours { rank: ranks.rank(), host, sharing: arguments.weights.into() });
        let place = Place { device, gpu, groups: ranks.groups(), road: arguments.exchange.into(), neighbours };
        let introduction = Introduction {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            plans: plans.iter().map(PlanFile::hash).collect(),
            device: name,
        };
        if ranks.rank() > 0 {
            ranks.send(0, &Message::Introduction(introduction))?;
            return Ok(place);
        }
        ranks.meet(&introduction)?;
        for plan in plans {
            let (programs, found) = (plan.manifest.ranks.len(), ranks.size());
            if found % programs != 0 {
                bail!(
                    "ranks: plan `{}` has programs for {programs}: expected a multiple of {programs}, found {found}; start another number, \
                     or compile the plan with another --ranks",
                    plan.manifest.model.name
                );
            }
        }
        Ok(place)
    }

    /// Rank 0 tells the others to load a plan's weights, by its place among those that were agreed on.
    ///
    /// # Errors
    /// The ranks cannot be reached.
    pub fn load(&mut self, plan: usize) -> Result<()> {
        self.ranks.as_mut().map_or(Ok(()), |ranks| ranks.send_to_others(&Message::Load(plan)))
    }

    /// Waits until all have loaded them.
    ///
    /// # Errors
    /// The ranks cannot be reached.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.ranks.as_mut().map_or(Ok(()), Ranks::wait_until_ready)
    }

    /// Runs work on all ranks, or here; tells what each rank did, if there are several.
    ///
    /// # Errors
    /// The work or the executor failed.
    pub fn run<E: Executor + ?Sized>(
        &mut self,
        generator: &mut Generator<'_, E>,
        work: &mut impl Work,
        options: Options,
        mode: Mode,
    ) -> Result<Vec<Summary>> {
        match &mut self.ranks {
            Some(ranks) => ranks::lead(ranks, generator, work, options, mode),
            None => generator.run(work).map(|()| vec![]),
        }
    }

    /// The ranks by number, if there are several.
    pub fn peers(&self) -> &[Peer] {
        self.ranks.as_ref().map_or(&[], Ranks::peers)
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.ranks.as_ref().map_or(1, Ranks::size)
    }

    /// All ranks have done the same work, and rank 0 goes on alone: whether that is this one.
    ///
    /// # Errors
    /// The ranks cannot be reached.
    pub fn finish(&mut self) -> Result<bool> {
        match self.follower().map(next_order).transpose()? {
            Some(Order::Stop) => self.leave().map(|()| false),
            Some(other) => bail!("rank 0: expected the end, found {other:?}; this is a bug"),
            None => self.leave().map(|()| true),
        }
    }

    /// All that ranks do together is done; this process goes on alone.
    ///
    /// # Errors
    /// The ranks cannot be reached.
    pub fn leave(&mut self) -> Result<()> {
        self.ranks.take().map_or(Ok(()), Ranks::leave)
    }

    /// The end of a command. A failure while ranks work together ends all of them.
    ///
    /// # Errors
    /// The command's own.
    pub fn end(mut self, result: Result<()>) -> Result<()> {
        match result {
            Err(error) => match &mut self.ranks {
                Some(ranks) => ranks.fail(if is_usage(&error) { 2 } else { 1 }, &error, describe(&error)),
                None => Err(error),
            },
            Ok(()) => self.leave(),
        }
    }
}

/// A usage error of every rank, which rank 0 tells.
fn usage_of_all<V>(message: String) -> Result<V> {
    usage(if ranks::launched().is_some_and(|launched| launched.rank > 0) { String::new() } else { message })
}

/// What each rank did in so many seconds.
pub fn rank_table(peers: &[Peer], summaries: &[Summary], seconds: f64) -> String {
    let rows = peers.iter().zip(summaries).map(|(peer, summary)| {
        let statistics = &summary.statistics;
        let busy = if seconds > 0.0 { 100.0 * summary.busy_seconds() / seconds } else { 0.0 };
        vec![
            peer.rank.to_string(),
            peer.host.clone(),
            peer.pid.to_string(),
            summary.sequences.to_string(),
            (statistics.prefill.rows + statistics.decode.rows).to_string(),
            statistics.tokens.to_string(),
            format!("{busy:.1} %"),
        ]
    });
    table(&["rank", "host", "pid", "sequences", "rows", "new tokens", "busy"], &rows.collect::<Vec<_>>())
}
