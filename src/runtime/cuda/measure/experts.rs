//! How many experts the rows of a step select, layer by layer: the weights that must be read depend on it.

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::plan::{Op, Program, Semantic, Slot, Step, TensorType, scope};
use crate::runtime::cuda::CudaExecutor;

/// What one layer's router chose.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LayerExperts {
    /// Scope of the layer's steps: `layers.3.ffn`.
    pub scope: String,
    /// Experts there are.
    pub experts: u64,
    /// Experts a row selects.
    pub per_token: u64,
    /// Rows that select, padding left out.
    pub rows: usize,
    /// Experts that any row selects.
    pub distinct: usize,
}

/// Distinct experts over the layers of a bucket, beside what routing gives that is uniform.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Distinct {
    /// Layers with experts.
    pub layers: usize,
    /// Mean over the layers.
    pub mean: f64,
    /// Fewest.
    pub least: usize,
    /// Mean that uniform routing gives.
    pub uniform: f64,
    /// Standard deviation of that mean.
    pub deviation: f64,
}

impl Distinct {
    /// Of some layers; none where there are none.
    pub fn of(layers: &[LayerExperts]) -> Option<Distinct> {
        let least = layers.iter().map(|layer| layer.distinct).min()?;
        let count = layers.len() as f64;
        let moments = layers.iter().map(|layer| expected_distinct(layer.experts, layer.per_token, layer.rows));
        let (sum, variance) = moments.fold((0.0, 0.0), |(a, b), (mean, variance)| (a + mean, b + variance));
        Some(Distinct {
            layers: layers.len(),
            mean: layers.iter().map(|layer| layer.distinct as f64).sum::<f64>() / count,
            least,
            uniform: sum / count,
            // Of a mean of independent layers.
            deviation: variance.sqrt() / count,
        })
    }

    /// True if rows select so much alike that their times say little: fewer than 95 % of uniform routing's experts, and
    /// fewer than three standard deviations of it explain.
    pub fn is_degenerate(&self) -> bool {
        // Rounding must not decide where uniform routing leaves no choice.
        self.mean < (0.95 * self.uniform).min(self.uniform - 3.0 * self.deviation) - 1e-9
    }
}

/// Mean and variance of the number of distinct experts if each of `rows` selects `k` of `experts`, all sets alike.
pub fn expected_distinct(experts: u64, k: u64, rows: usize) -> (f64, f64) {
    let (e, k, n) = (experts as f64, k.min(experts) as f64, rows as f64);
    if e < 1.0 {
        return (0.0, 0.0);
    }
    // Chances that one expert, and that two, are selected by no row.
    let one = (1.0 - k / e).powf(n);
    let two = if e < 2.0 { 0.0 } else { ((e - k) * (e - k - 1.0) / (e * (e - 1.0))).max(0.0).powf(n) };
    let variance = e * one + e * (e - 1.0) * two - e * e * one * one;
    (e * (1.0 - one), variance.max(0.0))
}

/// Where a step writes what its router chose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Choice {
    /// Position among the step's outputs.
    output: usize,
    /// Whether it holds each row's experts, or the offsets of each expert's rows.
    offsets: bool,
    experts: u64,
    per_token: u64,
}

/// What a step of this meaning shows of a router's choice; of both forms, the experts themselves.
fn choice(semantic: &Semantic) -> Option<Choice> {
    let ty = |slot: Slot| -> Option<&TensorType> {
        match slot {
            Slot::In(i) => semantic.inputs.get(i as usize),
            Slot::Out(i) => semantic.outputs.get(i as usize),
            Slot::Temp(i) => semantic.temps.get(i as usize),
        }
    };
    let last = |slot: &Slot| ty(*slot)?.1.last().copied();
    let found = semantic.body.iter().filter_map(|instr| match (&instr.0, &instr.1[..], &instr.2[..]) {
        (Op::TopK, [scores, ..], [chosen @ Slot::Out(output)]) => {
            Some(Choice { output: *output as usize, offsets: false, experts: last(scores)?, per_token: last(chosen)? })
        }
        (Op::LocalExperts { experts, .. }, [chosen, ..], [Slot::Out(output)]) => Some(Choice {
            output: *output as usize,
            offsets: false,
            experts: experts.len() as u64,
            per_token: last(chosen)?,
        }),
        (Op::GroupRows, [chosen, ..], [_, _, offsets @ Slot::Out(output)]) => Some(Choice {
            output: *output as usize,
            offsets: true,
            experts: last(offsets)?.checked_sub(1)?,
            per_token: last(chosen)?,
        }),
        _ => None,
    });
    found.min_by_key(|choice| choice.offsets)
}

/// Rows that select and experts that any of them selects, by the numbers that a step wrote.
fn read_choice(choice: &Choice, numbers: &[i32]) -> Result<(usize, usize)> {
    let (experts, k) = (usize::try_from(choice.experts)?, usize::try_from(choice.per_token)?.max(1));
    if choice.offsets {
        ensure!(numbers.len() == experts + 1, "expected {} offsets, found {}", experts + 1, numbers.len());
        let ascending = numbers.windows(2).all(|pair| pair[0] <= pair[1]);
        ensure!(numbers[0] == 0 && ascending, "expected ascending offsets from 0, found {numbers:?}");
        let distinct = numbers.windows(2).filter(|pair| pair[0] != pair[1]).count();
        return Ok((numbers[experts] as usize / k, distinct));
    }
    let mut seen = vec![false; experts];
    let mut rows = 0;
    for row in numbers.chunks(k) {
        rows += usize::from(row.iter().any(|&expert| expert >= 0));
        for &expert in row.iter().filter(|&&expert| expert >= 0) {
            let place = seen.get_mut(expert as usize);
            *place.with_context(|| format!("expected experts below {experts}, found {expert}"))? = true;
        }
    }
    Ok((rows, seen.iter().filter(|&&seen| seen).count()))
}

/// Runs steps of a bucket one by one over the inputs that the device holds, and reads back what each router chose.
///
/// # Errors
/// A step failed or chose what there is not.
pub fn count_experts(executor: &CudaExecutor, bucket: usize, steps: &[usize]) -> Result<Vec<LayerExperts>> {
    let program = executor.program();
    let at = program.buckets.get(bucket).with_context(|| format!("no bucket {bucket}"))?;
    let mut layers: Vec<LayerExperts> = vec![];
    for &i in steps {
        executor.launch_step(bucket, i)?;
        let step = at.steps.get(i).with_context(|| format!("no step {i} in bucket {}", at.name))?;
        let what = || format!("step {} of bucket {}", step.name, at.name);
        if let Some(found) = read_step(executor, program, bucket, step).with_context(what)? {
            // Sorting repeats what selecting said, and of experts that are spread over ranks, this rank's count.
            layers.retain(|layer| layer.scope != found.scope);
            layers.push(found);
        }
    }
    executor.stream().synchronize()?;
    Ok(layers)
}

fn read_step(executor: &CudaExecutor, program: &Program, bucket: usize, step: &Step) -> Result<Option<LayerExperts>> {
    let semantic = program.semantics.get(step.op as usize).context("it has no semantic")?;
    let Some(choice) = choice(semantic) else { return Ok(None) };
    let place = step.writes.get(choice.output).context("it writes no such output")?;
    let bytes = semantic.outputs.get(choice.output).and_then(TensorType::bytes).context("an output without a size")?;
    let mut numbers = vec![0i32; usize::try_from(bytes)? / size_of::<i32>()];
    executor.read(bucket, *place, bytemuck::cast_slice_mut(&mut numbers))?;
    let (rows, distinct) = read_choice(&choice, &numbers)?;
    let Choice { experts, per_token, .. } = choice;
    Ok(Some(LayerExperts { scope: scope(&step.name).to_owned(), experts, per_token, rows, distinct }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{DType, Instr};

    #[test]
    fn uniform_routing_is_as_counted_by_hand() {
        // One row leaves no choice; two rows of one expert each meet in one of four.
        assert_eq!(expected_distinct(32, 4, 1).0, 4.0);
        assert!(expected_distinct(32, 4, 1).1 < 1e-9);
        let (mean, variance) = expected_distinct(4, 1, 2);
        assert!((mean - 1.75).abs() < 1e-12 && (variance - 0.25 * 0.75).abs() < 1e-12, "{mean} {variance}");
        let (mean, _) = expected_distinct(32, 4, 8);
        assert!((mean - 32.0 * (1.0 - 0.875f64.powi(8))).abs() < 1e-12);
        assert_eq!(expected_distinct(8, 8, 3), (8.0, 0.0));
        assert_eq!(expected_distinct(1, 1, 5), (1.0, 0.0));
    }

    fn layers(distinct: &[usize], rows: usize) -> Distinct {
        let layer = |(i, &distinct)| LayerExperts {
            scope: format!("layers.{i}.ffn"),
            experts: 32,
            per_token: 4,
            rows,
            distinct,
        };
        Distinct::of(&distinct.iter().enumerate().map(layer).collect::<Vec<_>>()).expect("there are layers")
    }

    #[test]
    fn rows_alike_are_degenerate_and_noise_is_not() {
        // Eight equal rows select four experts where uniform ones select twenty-one.
        assert!(layers(&[4; 22], 8).is_degenerate());
        assert!(!layers(&[21; 22], 8).is_degenerate());
        assert!(!layers(&[4; 22], 1).is_degenerate(), "one row selects as many as it can");
        // Two rows in one layer often share one of four.
        assert!(!layers(&[6], 2).is_degenerate());
        assert!(layers(&[4; 22], 2).is_degenerate());
        assert_eq!(layers(&[20, 22, 24], 8).least, 20);
        assert!(Distinct::of(&[]).is_none());
    }

    #[test]
    fn choices_are_read_from_experts_or_offsets() {
        let ids = Choice { output: 0, offsets: false, experts: 4, per_token: 2 };
        assert_eq!(read_choice(&ids, &[0, 3, 3, 1, -1, -1]).expect("in range"), (2, 3));
        assert!(read_choice(&ids, &[0, 4]).is_err());
        let offsets = Choice { offsets: true, ..ids };
        assert_eq!(read_choice(&offsets, &[0, 1, 1, 2, 4]).expect("ascending"), (2, 3));
        assert!(read_choice(&offsets, &[0, 2, 1, 2, 4]).is_err());
        assert!(read_choice(&offsets, &[0, 1]).is_err());
    }

    #[test]
    fn a_fused_router_shows_its_offsets() {
        let ints = |shape: &[u64]| TensorType(DType::I32, shape.to_vec());
        let scores = TensorType(DType::F32, vec![2, 4]);
        let group = Instr(Op::GroupRows, vec![Slot::Temp(1)], vec![Slot::Out(0), Slot::Out(1), Slot::Out(2)]);
        let mut semantic = Semantic {
            name: "router+group".into(),
            inputs: vec![],
            outputs: vec![ints(&[4]), ints(&[2, 2]), ints(&[5])],
            temps: vec![scores, ints(&[2, 2])],
            body: vec![Instr(Op::TopK, vec![Slot::Temp(0), Slot::In(0)], vec![Slot::Temp(1)]), group],
        };
        let expected = Choice { output: 2, offsets: true, experts: 4, per_token: 2 };
        assert_eq!(choice(&semantic), Some(expected));
        semantic.body[0].2 = vec![Slot::Out(1)];
        assert_eq!(choice(&semantic), Some(Choice { output: 1, offsets: false, ..expected }));
        semantic.body.clear();
        assert_eq!(choice(&semantic), None);
    }
}
