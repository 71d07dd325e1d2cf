//! The shape and type rules of a plan's operators. Shapes are constant here, because a bucket fixes them.

use super::Show;
use super::payload::{self, pages};
use super::rule::{Rule, any_float, cache, float, index, index_shape, number, row_data, same, shape, whole_blocks};
use crate::plan::{DType, Op, SAMPLING_COLUMNS, StateRole, TURNS, TensorType};

/// The arguments that are persistent state, and what they are for.
pub(super) fn state_arguments(op: &Op, arguments: &[&TensorType]) -> Vec<(usize, StateRole)> {
    match op {
        Op::Conv1dCausal => vec![(2, StateRole::ConvRing)],
        Op::KvWrite => vec![(2, StateRole::KvPages), (3, StateRole::BlockTable)],
        Op::Attention { .. } => vec![(1, StateRole::KvPages), (2, StateRole::BlockTable)],
        Op::Sample => vec![(4, StateRole::Sampling)],
        Op::Send { .. } | Op::Receive { .. } => {
            let pages = pages(arguments).map(|at| (at, StateRole::BlockTable));
            std::iter::once((0, StateRole::Link)).chain(pages).collect()
        }
        _ => vec![],
    }
}

/// The state argument that is written in place.
pub(super) fn updated_argument(op: &Op) -> Option<usize> {
    match op {
        Op::Conv1dCausal | Op::KvWrite => Some(2),
        Op::Send { .. } | Op::Receive { .. } => Some(0),
        _ => None,
    }
}

/// Checks count, types and shapes of an operator's arguments and results.
pub(super) fn check(op: &Op, arguments: &[&TensorType], results: &[&TensorType]) -> Result<(), String> {
    let rule = Rule { arguments, results };
    match op {
        Op::Embed => {
            let [tokens, table] = rule.arguments()?;
            let ([rows], [_, width]) = (index(tokens)?, float(table)?);
            rule.result(None, &[rows, width])
        }
        Op::RmsNorm { eps } => {
            let [x, weight] = rule.arguments()?;
            number("eps", *eps, *eps >= 0.0)?;
            any_float(x)?;
            let [group] = float(weight)?;
            match x.1.last() {
                Some(last) if last % group == 0 => rule.result(None, &x.1),
                _ => Err(format!("expected a last axis of whole groups of {group}, found {}", Show(x))),
            }
        }
        Op::Matmul => {
            let [x, weight] = rule.arguments()?;
            let ([rows, inner], [columns, weight_inner]) = (float(x)?, float(weight)?);
            same("inner dimension", weight_inner, inner)?;
            rule.result(None, &[rows, columns])
        }
        Op::Split { block } => rule.split(*block),
        Op::Pointwise(registers) => rule.pointwise(registers),
        Op::Conv1dCausal => {
            let [u, weight, state, pos, slot] = rule.arguments()?;
            let ([rows, channels], [weight_channels, taps]) = (float(u)?, float(weight)?);
            let [_, ring, state_channels] = float(state)?;
            same("channels of the weight", weight_channels, channels)?;
            same("channels of the state", state_channels, channels)?;
            row_data(rows, &[pos, slot])?;
            if ring < taps {
                return Err(format!("a ring of {ring} columns does not hold the {taps} taps"));
            }
            rule.result(None, &[rows, channels])
        }
        Op::Rope { theta, head_dim } => {
            let [x, pos] = rule.arguments()?;
            let [rows, width] = float(x)?;
            row_data(rows, &[pos])?;
            number("theta", *theta, *theta > 0.0)?;
            if *head_dim == 0 || head_dim % 2 != 0 || width % head_dim != 0 {
                return Err(format!("expected an even `head_dim` that divides {width}, found {head_dim}"));
            }
            rule.result(None, &x.1)
        }
        Op::KvWrite => {
            let [k, v, kv, table, pos, slot] = rule.arguments()?;
            let ([rows, width], [v_rows, v_width]) = (float(k)?, float(v)?);
            same("rows of v", v_rows, rows)?;
            same("width of v", v_width, width)?;
            row_data(rows, &[pos, slot])?;
            let (heads, head_dim) = cache(kv, table)?;
            same("width of k", width, heads.saturating_mul(head_dim))?;
            rule.no_result()
        }
        Op::Attention { heads, scale } => {
            let [q, kv, table, pos, slot] = rule.arguments()?;
            let [rows, width] = float(q)?;
            row_data(rows, &[pos, slot])?;
            number("scale", *scale, true)?;
            let (kv_heads, head_dim) = cache(kv, table)?;
            same("width of q", width, heads.saturating_mul(head_dim))?;
            if *heads == 0 || heads % kv_heads != 0 {
                return Err(format!("`heads`: expected a multiple of {kv_heads}, found {heads}"));
            }
            rule.result(None, &q.1)
        }
        Op::TopK => {
            let [scores, slot] = rule.arguments()?;
            let [rows, columns] = float(scores)?;
            row_data(rows, &[slot])?;
            let k = rule.last_of_result(2)?;
            if k > columns {
                return Err(format!("expected at most {columns} columns chosen, found {k}"));
            }
            rule.result(Some(DType::I32), &[rows, k])
        }
        Op::GatherRows => {
            let [x, rows] = rule.arguments()?;
            let ([_, width], [count]) = (float(x)?, index(rows)?);
            rule.result(Some(x.0), &[count, width])
        }
        Op::GatherColumns => {
            let [x, columns] = rule.arguments()?;
            let ([rows, _], [column_rows, k]) = (float(x)?, index(columns)?);
            same("rows", column_rows, rows)?;
            rule.result(Some(x.0), &[rows, k])
        }
        Op::RowSum => {
            let [x] = rule.arguments()?;
            any_float(x)?;
            match x.1.split_last() {
                Some((_, outer)) => rule.result(None, &[outer, &[1]].concat()),
                None => Err("expected an axis to sum, found a scalar".into()),
            }
        }
        Op::ExpertMatmul => {
            let [x, weight, experts] = rule.arguments()?;
            let ([_, columns, weight_inner], [rows, k]) = (float(weight)?, index(experts)?);
            any_float(x)?;
            let expected = if x.1.len() == 2 { vec![rows, weight_inner] } else { vec![rows, k, weight_inner] };
            shape("x", x, &expected)?;
            rule.result(None, &[rows, k, columns])
        }
        Op::WeightedSum => {
            let [y, weights, experts] = rule.arguments()?;
            let [rows, k, width] = float(y)?;
            any_float(weights)?;
            shape("weights", weights, &[rows, k])?;
            index_shape("experts", experts, &[rows, k])?;
            rule.result(None, &[rows, width])
        }
        Op::GroupRows => {
            let [experts] = rule.arguments()?;
            let [rows, k] = index(experts)?;
            let [pairs, places, offsets] = rule.results()?;
            index_shape("pairs", pairs, &[rows.saturating_mul(k)])?;
            index_shape("places", places, &[rows, k])?;
            match index(offsets)? {
                [count] if count >= 2 => Ok(()),
                [count] => Err(format!("expected an offset for each expert and one more, found {count}")),
            }
        }
        Op::GatherPairs { k } => {
            let [x, pairs] = rule.arguments()?;
            let ([rows, width], [count]) = (float(x)?, index(pairs)?);
            same("number of pairs", count, rows.saturating_mul(*k))?;
            rule.result(Some(x.0), &[count, width])
        }
        Op::GroupedMatmulGather { k } => {
            let [x, weight, pairs, offsets] = rule.arguments()?;
            let ([rows, inner], [count]) = (float(x)?, index(pairs)?);
            same("number of pairs", count, rows.saturating_mul(*k))?;
            rule.grouped(inner, weight, offsets, count)
        }
        Op::GroupedMatmul => {
            let [x, weight, offsets] = rule.arguments()?;
            let [rows, inner] = float(x)?;
            rule.grouped(inner, weight, offsets, rows)
        }
        Op::GroupedWeightedSum => {
            let [y, weights, places] = rule.arguments()?;
            let ([pairs, width], [rows, k]) = (float(y)?, float(weights)?);
            index_shape("places", places, &[rows, k])?;
            same("number of pairs", pairs, rows.saturating_mul(k))?;
            rule.result(None, &[rows, width])
        }
        Op::AllGather { ranks } => rule.all_gather(*ranks),
        Op::AllToAll { ranks } => {
            let [x] = rule.arguments()?;
            let [rows, _] = float(x)?;
            whole_blocks(rows, *ranks)?;
            rule.result(Some(x.0), &x.1)
        }
        Op::Send { to, ranks } => {
            payload::other("to", *to, *ranks)?;
            rule.no_result()?;
            payload::check(payload::behind_link(arguments)?)
        }
        Op::Receive { from, ranks } => {
            payload::other("from", *from, *ranks)?;
            match payload::behind_link(arguments)? {
                [] => payload::check(results),
                more => Err(format!("expected a link alone, found {} arguments", more.len() + 1)),
            }
        }
        Op::LocalExperts { of, experts, parts } => {
            let chosen = if parts.is_empty() {
                let [chosen] = rule.arguments()?;
                chosen
            } else {
                let [chosen, weights] = rule.arguments()?;
                if weights.0 != DType::F32 {
                    return Err(format!("expected weights in f32, found {}", Show(weights)));
                }
                shape("weights", weights, &chosen.1)?;
                chosen
            };
            let [_, _] = index(chosen)?;
            if experts.is_empty() || !experts.is_sorted_by(|a, b| a < b) || experts.last() >= Some(of) {
                return Err(format!("expected ascending experts below {of}, at least one, found {experts:?}"));
            }
            let count = parts.len();
            let wrong = parts.iter().find(|(from, to)| from > to || *to > TURNS);
            if count > 0 && count != experts.len() || wrong.is_some() {
                let expected = experts.len();
                return Err(format!(
                    "expected {expected} parts of {TURNS} turns, or none, found {count}, of them {wrong:?}"
                ));
            }
            rule.result(Some(DType::I32), &chosen.1)
        }
        Op::BlockSum { blocks } => {
            let [x] = rule.arguments()?;
            let [rows, width] = float(x)?;
            rule.result(None, &[whole_blocks(rows, *blocks)?, width])
        }
        Op::Sample => {
            let [logits, rows, pos, slot, params] = rule.arguments()?;
            let ([count, _], [tokens]) = (float(logits)?, index(pos)?);
            row_data(count, &[rows])?;
            row_data(tokens, &[slot])?;
            let [_, columns] = index(params)?;
            same("parameter columns", columns, SAMPLING_COLUMNS)?;
            rule.result(Some(DType::I32), &[count])
        }
    }
}
