//! Which rank has which experts, as `--ranks` asks for.

use std::collections::BTreeSet;

use anyhow::Result;

use crate::codegen::compile::OptionError;
use crate::codegen::{CompileOptions, Source};
use crate::ir::config::FeedForward;
use crate::passes::Target;

/// The experts of each rank, if they are to be spread over several: as even as can be, neighbours together.
pub(super) fn expert_ranks(source: &Source, options: &CompileOptions) -> Result<Vec<Vec<u64>>> {
    let ranks = options.expert_ranks;
    if ranks == 1 {
        return Ok(vec![]);
    }
    let refuse = |expected: String, found: &str, fix: &str| {
        Err(OptionError(format!("--ranks expert={ranks}: expected {expected}, found {found}; {fix}")).into())
    };
    let Source::Recipe(recipe, _) = source else {
        return refuse("a model".into(), "a graph in text form", "compile it without --ranks");
    };
    let config = recipe.config()?;
    let counts: BTreeSet<u64> = config
        .layers
        .iter()
        .filter_map(|layer| match &layer.feed_forward {
            FeedForward::Experts(experts) => Some(experts.count),
            FeedForward::Dense(_) => None,
        })
        .collect();
    let fix = "compile it without --ranks, and start any number of ranks, each with the whole model";
    match (counts.first(), counts.last()) {
        (Some(&experts), Some(&most)) if experts == most => {
            if ranks == 0 || ranks > experts {
                let expected = format!("1 to {experts} ranks, as many as the model has experts");
                return refuse(expected, &ranks.to_string(), "choose a number in between");
            }
            if options.target != Target::Cpu {
                let expected = "--target cpu, the only one that ranks with experts of their own run on yet".to_owned();
                return refuse(expected, "sm_90a", "use --target cpu, or leave --ranks out");
            }
            let first = |rank: u64| rank * experts / ranks;
            Ok((0..ranks).map(|rank| (first(rank)..first(rank + 1)).collect()).collect())
        }
        (Some(few), Some(many)) => refuse("layers of as many experts each".into(), &format!("{few} to {many}"), fix),
        _ => refuse("a model with experts".into(), "none", fix),
    }
}
