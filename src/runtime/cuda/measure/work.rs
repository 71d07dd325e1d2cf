//! What steps must do at the least, and how long that takes at the least.

use anyhow::{Context, Result};
use serde::Serialize;

use super::experts::LayerExperts;
use crate::plan::{Op, Program, Slot, Step, scope};

/// Bytes that must cross memory, and floating-point operations.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize)]
pub struct Work {
    /// Bytes.
    pub bytes: f64,
    /// Floating-point operations.
    pub flops: f64,
}

impl std::ops::Add for Work {
    type Output = Work;

    fn add(self, other: Work) -> Work {
        Work { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Work>>(list: I) -> Work {
        list.fold(Work::default(), std::ops::Add::add)
    }
}

/// What a device can do at the most.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Ceilings {
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Floating-point operations a second; without it, only memory bounds a floor.
    pub flops_per_second: Option<f64>,
}

impl Ceilings {
    /// The least time of some work, in milliseconds.
    pub fn floor_ms(&self, work: &Work) -> f64 {
        let compute = self.flops_per_second.map_or(0.0, |peak| work.flops / peak);
        1e3 * (work.bytes / self.bytes_per_second).max(compute)
    }
}

/// The share of a time that its floor is; NaN where nothing was timed.
pub fn fraction(floor_ms: f64, measured_ms: f64) -> f64 {
    if measured_ms > 0.0 { floor_ms / measured_ms } else { f64::NAN }
}

/// What the work of a bucket depends on besides the plan.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Load {
    /// Positions in the state that the sequences have behind them when the step begins, all together.
    pub history: f64,
    /// Pairs of a row and a position that it looks at, its own among them.
    pub pairs: f64,
    /// What each layer's router chose.
    pub experts: Vec<LayerExperts>,
}

impl Load {
    /// The work of a step. Attention's products, which a plan leaves out, are added here.
    ///
    /// # Errors
    /// A step reads experts that nothing was counted of.
    pub fn work(&self, program: &Program, step: &Step) -> Result<Work> {
        let cost = &step.cost;
        let mut work = Work { bytes: cost.bytes as f64, flops: cost.flops as f64 };
        if cost.bytes_per_expert > 0 {
            let found = self.experts.iter().find(|layer| layer.scope == scope(&step.name));
            let layer = found.with_context(|| {
                format!(
                    "step {} reads experts: expected a step beside it that writes which, found none; its floor is unknown",
                    step.name
                )
            })?;
            work.bytes += cost.bytes_per_expert as f64 * layer.distinct as f64;
        }
        work.bytes += cost.bytes_per_position as f64 * self.history;
        work.flops += self.pairs * flops_per_pair(program, step);
        Ok(work)
    }

    /// The work of several steps of a bucket.
    ///
    /// # Errors
    /// As [`Load::work`].
    pub fn total<'s>(&self, program: &Program, steps: impl IntoIterator<Item = &'s Step>) -> Result<Work> {
        steps.into_iter().map(|step| self.work(program, step)).sum()
    }
}

/// Operations of a step's attention for one row and one position: a product and a sum for each channel, of scores and of values.
fn flops_per_pair(program: &Program, step: &Step) -> f64 {
    let Some(semantic) = program.semantics.get(step.op as usize) else { return 0.0 };
    let channels = semantic.body.iter().filter(|instr| matches!(instr.0, Op::Attention { .. })).filter_map(|instr| {
        let ty = match *instr.1.first()? {
            Slot::In(i) => semantic.inputs.get(i as usize),
            Slot::Out(i) => semantic.outputs.get(i as usize),
            Slot::Temp(i) => semantic.temps.get(i as usize),
        };
        ty?.1.last().copied()
    });
    channels.map(|channels| 4.0 * channels as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Cost, DType, Instr, Pool, Region, Semantic, TensorType};

    fn step(name: &str, op: u32, cost: Cost) -> Step {
        Step {
            name: name.into(),
            op,
            reads: vec![],
            writes: vec![],
            updates: vec![],
            after: vec![],
            cost,
            launch: None,
            collective: None,
            library: None,
        }
    }

    fn program() -> Program {
        let rows = |width| TensorType(DType::BF16, vec![2, width]);
        let attention = Op::Attention { heads: 2, scale: 0.5 };
        let body = vec![Instr(attention, vec![Slot::Temp(0)], vec![Slot::Out(0)])];
        let semantics = vec![
            Semantic { name: "matmul".into(), inputs: vec![], outputs: vec![], temps: vec![], body: vec![] },
            Semantic { name: "attention".into(), inputs: vec![], outputs: vec![rows(64)], temps: vec![rows(64)], body },
        ];
        let region = Region { offset: 0, bytes: 0 };
        let pool = Pool { weights: region, state: region, arena: region, io: region };
        Program { pool, weights: vec![], packed: vec![], states: vec![], io: vec![], semantics, buckets: vec![] }
    }

    fn load(distinct: usize) -> Load {
        let layer = LayerExperts { scope: "layers.3.ffn".into(), experts: 8, per_token: 2, rows: 2, distinct };
        Load { history: 20.0, pairs: 22.0, experts: vec![layer] }
    }

    #[test]
    fn experts_and_history_count_by_what_was_found() {
        let cost = Cost { bytes: 10, bytes_per_expert: 100, bytes_per_position: 0, flops: 7, ..Cost::default() };
        let found =
            load(3).work(&program(), &step("layers.3.ffn.expert+swiglu", 0, cost)).expect("its layer was counted");
        assert_eq!(found, Work { bytes: 310.0, flops: 7.0 });
        let error = load(3).work(&program(), &step("layers.4.ffn.expert+swiglu", 0, cost)).expect_err("not counted");
        assert!(error.to_string().contains("layers.4.ffn.expert+swiglu"), "{error}");
        let cost = Cost { bytes: 10, bytes_per_expert: 0, bytes_per_position: 5, flops: 0, ..Cost::default() };
        let found = load(3).work(&program(), &step("layers.2.attention.attention", 1, cost)).expect("no experts");
        assert_eq!(found, Work { bytes: 110.0, flops: 22.0 * 4.0 * 64.0 });
    }

    #[test]
    fn a_floor_is_the_longer_of_memory_and_compute() {
        let work = Work { bytes: 4e9, flops: 1e12 };
        let memory = Ceilings { bytes_per_second: 4e12, flops_per_second: None };
        assert!((memory.floor_ms(&work) - 1.0).abs() < 1e-12);
        let both = Ceilings { flops_per_second: Some(5e14), ..memory };
        assert!((both.floor_ms(&work) - 2.0).abs() < 1e-12);
        assert_eq!(fraction(1.0, 4.0), 0.25);
        assert!(fraction(1.0, 0.0).is_nan());
    }
}
