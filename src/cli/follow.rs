//! A command on the ranks other than 0, which have neither input nor output: they load what rank 0 loads, and run what it gives them.

use std::cell::OnceCell;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cli::device::{Device, RankArguments};
use crate::cli::world::World;
use crate::cli::{load, text};
use crate::plan::PlanFile;
use crate::runtime::cuda::Graphs;
use crate::runtime::ranks::{Message, Order, Stop, follow, next_order};
use crate::runtime::{Executor, Generator};
use crate::text::Text;

/// What a rank runs when it is told to.
pub struct Following<'a> {
    /// The same on all ranks.
    pub plans: &'a [PlanFile],
    /// The Hugging Face directory whose checkpoint gives the weights.
    pub model: Option<&'a Path>,
    /// What plans run on.
    pub device: Device,
    /// What ranks do on GPUs.
    pub ranks: RankArguments,
    /// Whether buckets run as graphs.
    pub graphs: Graphs,
    /// Whether what is loaded is to be timed, so that graphs are captured at once.
    pub timed: bool,
}

impl Following<'_> {
    /// Follows rank 0 until it has nothing more.
    ///
    /// # Errors
    /// Rank 0 or the executor failed.
    pub fn run(&self, world: &mut World) -> Result<()> {
        let place = world.agree(self.plans, self.device, self.ranks)?;
        let ranks = world.follower().context("rank 0 follows nobody; this is a bug")?;
        let mut loaded: Option<(&PlanFile, Box<dyn Executor>)> = None;
        loop {
            match next_order(ranks)? {
                Order::Load(at) => {
                    // What is loaded already makes room first.
                    drop(loaded.take());
                    let plan = self.plans.get(at).with_context(|| {
                        let found = self.plans.len();
                        format!("expected --compare as on rank 0, found {found} plan; give all ranks the same options")
                    })?;
                    let executor = match self.timed {
                        true => load::prepared_executor(plan, self.model, place.clone(), self.graphs)?,
                        false => load::executor(plan, self.model, place.clone(), self.graphs)?,
                    };
                    loaded = Some((plan, executor));
                    ranks.send(0, &Message::Ready)?;
                }
                Order::Round(options) => {
                    let (plan, executor) =
                        loaded.as_mut().context("a round before weights are loaded; this is a bug")?;
                    let mut generator = Generator::new(&mut **executor, options)?;
                    let text = OnceCell::new();
                    follow(ranks, &mut generator, |stops| stop(&text, plan, self.model, stops))?;
                }
                Order::Stop => return Ok(()),
            }
        }
    }
}

/// What decides where a sequence stops. The rules of text are read when they are first needed.
fn stop<'t>(text: &'t OnceCell<Text>, plan: &PlanFile, model: Option<&Path>, stops: &[String]) -> Result<Stop<'t>> {
    if text.get().is_none() {
        let _ = text.set(text::open(plan, model)?);
    }
    let mut stream = text.get().context("the rules of text; this is a bug")?.stream(stops);
    Ok(Box::new(move |token| Ok(stream.push(token)?.stopped)))
}
