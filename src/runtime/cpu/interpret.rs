//! Interprets what a step computes.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::attention::{Attention, Pages};
use super::conv::Conv;
use super::sample::Sample;
use super::tensor::{Value, View, dims, elements, rows_and_last};
use super::{attention, conv, experts, matmul, norm, pointwise, select};
use crate::plan::{Instr, Op, Semantic, Slot, TensorType, turn};

/// An input of a step.
pub(super) enum Input<'a> {
    /// Read only.
    View(View<'a>),
    /// Bytes of the state region, which operators may update.
    State(Range<usize>),
}

/// What a step makes.
pub(super) struct Made {
    pub(super) outputs: Vec<Value>,
    /// What a router in it chose, and of how many experts.
    pub(super) chosen: Option<(Vec<i32>, usize)>,
}

/// Runs the operators in order over the inputs and the state region.
pub(super) fn interpret(semantic: &Semantic, inputs: Vec<Input>, state: &mut [u8]) -> Result<Made> {
    ensure!(inputs.len() == semantic.inputs.len(), "{} inputs for {}", inputs.len(), semantic.inputs.len());
    let outputs = semantic.outputs.iter().map(|_| None).collect();
    let temps = semantic.temps.iter().map(|_| None).collect();
    let mut frame = Frame { semantic, inputs, state, outputs, temps, chosen: None };
    for (i, instr) in semantic.body.iter().enumerate() {
        frame.run(instr).with_context(|| format!("operator {i}, {}", name(&instr.0)))?;
    }
    let outputs = frame.outputs.into_iter().enumerate();
    let outputs = outputs.map(|(i, value)| value.with_context(|| format!("no operator makes output {i}")));
    Ok(Made { outputs: outputs.collect::<Result<_>>()?, chosen: frame.chosen })
}

/// The operator without its attributes.
fn name(op: &Op) -> String {
    let text = format!("{op:?}");
    text.split([' ', '(']).next().unwrap_or_default().to_string()
}

struct Frame<'a, 's> {
    semantic: &'a Semantic,
    inputs: Vec<Input<'a>>,
    state: &'s mut [u8],
    outputs: Vec<Option<Value>>,
    temps: Vec<Option<Value>>,
    chosen: Option<(Vec<i32>, usize)>,
}

impl<'a> Frame<'a, '_> {
    fn run(&mut self, Instr(op, args, results): &Instr) -> Result<()> {
        let values = match op {
            Op::Conv1dCausal => vec![Value::F32(self.conv(args)?)],
            Op::KvWrite => {
                self.kv_write(args)?;
                vec![]
            }
            _ => self.pure(op, args, results)?,
        };
        ensure!(values.len() == results.len(), "{} results, {} declared", values.len(), results.len());
        if let (Op::TopK, [Value::I32(chosen)], [scores, ..]) = (op, &values[..], &args[..]) {
            self.chosen = Some((chosen.clone(), rows_and_last(self.ty(*scores)?)?.1));
        }
        for (&slot, value) in results.iter().zip(values) {
            let value = value.rounded(self.ty(slot)?)?;
            let place = match slot {
                Slot::Out(i) => self.outputs.get_mut(i as usize),
                Slot::Temp(i) => self.temps.get_mut(i as usize),
                Slot::In(_) => None,
            };
            *place.with_context(|| format!("{slot:?} takes no result"))? = Some(value);
        }
        Ok(())
    }

    /// Operators that write no state.
    fn pure(&self, op: &Op, args: &[Slot], results: &[Slot]) -> Result<Vec<Value>> {
        let result = || results.first().context("no result").and_then(|&slot| self.ty(slot));
        let numbers = match op {
            Op::Embed => {
                let [tokens, table] = slots(args)?;
                select::rows(self.view(table)?, self.ty(table)?, self.i32(tokens)?)?
            }
            Op::RmsNorm { eps } => {
                let [x, weight] = slots(args)?;
                norm::rms_norm(self.view(x)?, self.ty(x)?, self.view(weight)?, *eps)?
            }
            Op::Matmul => {
                let [x, weight] = slots(args)?;
                let ([m, k], [n, _]) = (dims(self.ty(x)?)?, dims(self.ty(weight)?)?);
                matmul::product(&self.view(x)?.to_f32()?, self.view(weight)?, m, k, n)?
            }
            Op::Split { block } => {
                let [x] = slots(args)?;
                let sizes = results.iter().map(|&slot| Ok(rows_and_last(self.ty(slot)?)?.1));
                let parts = select::split(self.view(x)?, self.ty(x)?, &sizes.collect::<Result<Vec<_>>>()?, *block)?;
                return Ok(parts.into_iter().map(Value::F32).collect());
            }
            Op::Pointwise(body) => {
                let operands =
                    args.iter().map(|&slot| Ok((self.view(slot)?, self.ty(slot)?))).collect::<Result<Vec<_>>>()?;
                pointwise::evaluate(body, &operands, result()?)?
            }
            Op::Rope { theta, head_dim } => {
                let [x, pos] = slots(args)?;
                norm::rope(self.view(x)?, self.ty(x)?, self.i32(pos)?, *theta, *head_dim)?
            }
            Op::Attention { heads, scale } => {
                let [q, kv, table, pos, slot] = slots(args)?;
                Attention {
                    q: &self.view(q)?.to_f32()?,
                    kv: self.view(kv)?,
                    pages: Pages::new(self.ty(kv)?, self.i32(table)?, self.ty(table)?)?,
                    pos: self.i32(pos)?,
                    slots: self.i32(slot)?,
                    heads: usize::try_from(*heads)?,
                    scale: *scale as f32,
                }
                .compute()?
            }
            Op::TopK => {
                let [scores, slot] = slots(args)?;
                let [_, k] = dims(result()?)?;
                return Ok(vec![Value::I32(select::top_k(self.view(scores)?, self.ty(scores)?, self.i32(slot)?, k)?)]);
            }
            Op::GatherRows => {
                let [x, rows] = slots(args)?;
                select::rows(self.view(x)?, self.ty(x)?, self.i32(rows)?)?
            }
            Op::GatherColumns => {
                let [x, columns] = slots(args)?;
                select::columns(self.view(x)?, self.ty(x)?, self.i32(columns)?, self.ty(columns)?)?
            }
            Op::RowSum => {
                let [x] = slots(args)?;
                norm::row_sum(self.view(x)?, self.ty(x)?)?
            }
            Op::Sample => {
                let [logits, rows, pos, slot, params] = slots(args)?;
                let sample = Sample {
                    rows: self.i32(rows)?,
                    pos: self.i32(pos)?,
                    slots: self.i32(slot)?,
                    params: self.i32(params)?,
                };
                return Ok(vec![Value::I32(sample.compute(self.view(logits)?)?)]);
            }
            _ => return self.expert(op, args, results),
        };
        Ok(vec![Value::F32(numbers)])
    }

    /// Operators over experts.
    fn expert(&self, op: &Op, args: &[Slot], results: &[Slot]) -> Result<Vec<Value>> {
        let numbers = match op {
            Op::ExpertMatmul => {
                let [x, weight, chosen] = slots(args)?;
                let [_, k] = dims(self.ty(chosen)?)?;
                let assignment = experts::by_pair(self.i32(chosen)?, k, self.ty(x)?.1.len() == 3);
                experts::product(&self.view(x)?.to_f32()?, self.view(weight)?, self.ty(weight)?, &assignment)?
            }
            Op::LocalExperts { experts: local, parts, .. } => {
                let chosen = self.i32(*args.first().context("no choices")?)?;
                let Some(&weights) = args.get(1) else {
                    return Ok(vec![Value::I32(experts::local(chosen, local, |_, _| true))]);
                };
                let [_, k] = dims(self.ty(weights)?)?;
                let weights = self.view(weights)?.to_f32()?;
                let turns: Vec<u64> = weights.chunks(k.max(1)).map(turn).collect();
                let own = |pair: usize, at: usize| parts[at].0 <= turns[pair / k] && turns[pair / k] < parts[at].1;
                return Ok(vec![Value::I32(experts::local(chosen, local, own))]);
            }
            Op::BlockSum { blocks } => {
                let [x] = slots(args)?;
                experts::block_sum(&self.view(x)?.to_f32()?, usize::try_from(*blocks)?)?
            }
            Op::GroupRows => {
                let [chosen] = slots(args)?;
                let offsets = results.get(2).context("three results are needed")?;
                let count = elements(self.ty(*offsets)?)?.checked_sub(1).context("no offsets")?;
                let groups = experts::group_rows(self.i32(chosen)?, count)?;
                return Ok([groups.pairs, groups.places, groups.offsets].map(Value::I32).into());
            }
            Op::GatherPairs { k } => {
                let [x, pairs] = slots(args)?;
                let k = i32::try_from(*k).ok().filter(|&k| k > 0).context("no experts a token")?;
                let rows: Vec<i32> = self.i32(pairs)?.iter().map(|pair| pair.div_euclid(k)).collect();
                select::rows(self.view(x)?, self.ty(x)?, &rows)?
            }
            Op::GroupedMatmulGather { k } => {
                let [x, weight, pairs, offsets] = slots(args)?;
                let (pairs, k) = (self.i32(pairs)?, usize::try_from(*k)?);
                ensure!(k > 0, "no experts a token");
                let source = |row: usize| Ok(usize::try_from(pairs[row])? / k);
                let assignment = experts::by_group(self.i32(offsets)?, pairs.len(), source)?;
                experts::product(&self.view(x)?.to_f32()?, self.view(weight)?, self.ty(weight)?, &assignment)?
            }
            Op::GroupedMatmul => {
                let [x, weight, offsets] = slots(args)?;
                let (rows, _) = rows_and_last(self.ty(x)?)?;
                let assignment = experts::by_group(self.i32(offsets)?, rows, Ok)?;
                experts::product(&self.view(x)?.to_f32()?, self.view(weight)?, self.ty(weight)?, &assignment)?
            }
            Op::WeightedSum | Op::GroupedWeightedSum => {
                let [y, weights, places] = slots(args)?;
                let ((_, n), [_, k]) = (rows_and_last(self.ty(y)?)?, dims(self.ty(weights)?)?);
                let places = self.i32(places)?;
                ensure!(places.len() == elements(self.ty(weights)?)?, "{} places of pairs", places.len());
                let grouped = matches!(op, Op::GroupedWeightedSum);
                let place = |pair: usize| {
                    let place = usize::try_from(places[pair]).ok()?;
                    Some(if grouped { place } else { pair })
                };
                experts::weighted_sum(&self.view(y)?.to_f32()?, n, &self.view(weights)?.to_f32()?, k, place)?
            }
            _ => bail!("an operator that updates state, or that ranks run together, stands where none is expected"),
        };
        Ok(vec![Value::F32(numbers)])
    }

    fn conv(&mut self, args: &[Slot]) -> Result<Vec<f32>> {
        let [u, weight, ring, pos, slot] = slots(args)?;
        let (range, ring_ty) = (self.state_range(ring)?, self.ty(ring)?);
        // Copied out, because an operand may lie in the region that is written.
        let u_values = self.view(u)?.to_f32()?.into_owned();
        let (pos, slots) = (self.i32(pos)?.to_vec(), self.i32(slot)?.to_vec());
        let conv = Conv {
            u: &u_values,
            u_ty: self.ty(u)?,
            weight: self.view(weight)?,
            weight_ty: self.ty(weight)?,
            pos: &pos,
            slots: &slots,
        };
        let out = conv.compute(self.view(ring)?, ring_ty)?;
        conv::update(&u_values, &pos, &slots, &mut self.state[range], ring_ty)?;
        Ok(out)
    }

    fn kv_write(&mut self, args: &[Slot]) -> Result<()> {
        let [k, v, kv, table, pos, slot] = slots(args)?;
        let range = self.state_range(kv)?;
        let pages = Pages::new(self.ty(kv)?, self.i32(table)?, self.ty(table)?)?;
        let destinations = pages.destinations(self.i32(pos)?, self.i32(slot)?)?;
        let (k, v) = (self.view(k)?.to_f32()?.into_owned(), self.view(v)?.to_f32()?.into_owned());
        let ty = self.ty(kv)?;
        attention::write(&k, &v, &destinations, &mut self.state[range], ty)
    }

    fn ty(&self, slot: Slot) -> Result<&'a TensorType> {
        let ty = match slot {
            Slot::In(i) => self.semantic.inputs.get(i as usize),
            Slot::Out(i) => self.semantic.outputs.get(i as usize),
            Slot::Temp(i) => self.semantic.temps.get(i as usize),
        };
        ty.with_context(|| format!("{slot:?} is not declared"))
    }

    fn view(&self, slot: Slot) -> Result<View<'_>> {
        let made = match slot {
            Slot::In(i) => match self.inputs.get(i as usize).with_context(|| format!("{slot:?} is not given"))? {
                Input::View(view) => return Ok(*view),
                Input::State(range) => {
                    let bytes = self.state.get(range.clone()).context("a state outside of its region")?;
                    return View::new(bytes, self.ty(slot)?.0);
                }
            },
            Slot::Out(i) => self.outputs.get(i as usize),
            Slot::Temp(i) => self.temps.get(i as usize),
        };
        let value = made.and_then(Option::as_ref).with_context(|| format!("{slot:?} is read before it is made"))?;
        Ok(value.view())
    }

    fn i32(&self, slot: Slot) -> Result<&[i32]> {
        self.view(slot)?.i32().with_context(|| format!("{slot:?}"))
    }

    fn state_range(&self, slot: Slot) -> Result<Range<usize>> {
        let input = if let Slot::In(i) = slot { self.inputs.get(i as usize) } else { None };
        match input {
            Some(Input::State(range)) => {
                ensure!(range.end <= self.state.len(), "a state outside of its region");
                Ok(range.clone())
            }
            _ => bail!("{slot:?} is updated, but is no state"),
        }
    }
}

fn slots<const N: usize>(args: &[Slot]) -> Result<[Slot; N]> {
    <[Slot; N]>::try_from(args).ok().with_context(|| format!("expected {N} arguments, found {}", args.len()))
}
