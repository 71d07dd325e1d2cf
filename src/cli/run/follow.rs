//! `lfm2c run` on the ranks other than 0, which have neither input nor output: they load what rank 0 loads, and run what it gives
//! them.

use anyhow::{Context, Result};

use super::Arguments;
use crate::cli::load;
use crate::cli::world::World;
use crate::plan::PlanFile;
use crate::runtime::ranks::{Message, Order, Stop, follow, next_order};
use crate::runtime::{Executor, Generator};
use crate::text::Text;

/// Does it.
pub fn execute(arguments: &Arguments, world: &mut World) -> Result<()> {
    let plans = super::plans(arguments)?;
    let place = world.agree(&plans, arguments.device)?;
    let ranks = world.follower().context("rank 0 follows nobody; this is a bug")?;
    let graphs = arguments.graphs();
    let model = arguments.model.as_deref();
    let mut loaded: Option<(&PlanFile, Box<dyn Executor>)> = None;
    loop {
        match next_order(ranks)? {
            Order::Load(at) => {
                // What is loaded already makes room first.
                drop(loaded.take());
                let plan = plans.get(at).with_context(|| {
                    format!(
                        "expected --compare as on rank 0, found {} plan; give all ranks the same options",
                        plans.len()
                    )
                })?;
                let executor = match super::is_samples(arguments) {
                    true => load::prepared_executor(plan, model, place.clone(), graphs)?,
                    false => load::executor(plan, model, place.clone(), graphs)?,
                };
                loaded = Some((plan, executor));
                ranks.send(0, &Message::Ready)?;
            }
            Order::Round(options) => {
                let (plan, executor) = loaded.as_mut().context("a round before weights are loaded; this is a bug")?;
                let mut generator = Generator::new(&mut **executor, options)?;
                let text: std::cell::OnceCell<Text> = std::cell::OnceCell::new();
                follow(ranks, &mut generator, |stops| stop(&text, plan, arguments, stops))?;
            }
            Order::Stop => return Ok(()),
        }
    }
}

/// What decides where a sequence stops. The rules of text are read when they are first needed.
fn stop<'t>(
    text: &'t std::cell::OnceCell<Text>,
    plan: &PlanFile,
    arguments: &Arguments,
    stops: &[String],
) -> Result<Stop<'t>> {
    if text.get().is_none() {
        let _ = text.set(crate::cli::text::open(plan, arguments.model.as_deref())?);
    }
    let mut stream = text.get().context("the rules of text; this is a bug")?.stream(stops);
    Ok(Box::new(move |token| Ok(stream.push(token)?.stopped)))
}
