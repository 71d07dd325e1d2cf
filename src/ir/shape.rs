//! The shape and type rules of every operator: the one place where they stand.

mod rule;

use self::rule::{Rule, positive, show};
use crate::ir::{DType, Dim, OpKind, TURNS, Type};

/// Columns of the sampling parameter table.
pub const SAMPLING_COLUMNS: u64 = 8;

/// The shapes of an operator's results from the types of its operands (a constant has shape `[]`).
///
/// # Errors
/// What does not fit, with expected and found.
pub fn result_shapes(kind: &OpKind, operands: &[Type]) -> Result<Vec<Vec<Dim>>, String> {
    let rule = Rule { kind, operands };
    Ok(match kind {
        OpKind::Embed => {
            let [tokens, table] = rule.operands([&[1], &[2]])?;
            vec![vec![tokens[0], table[1]]]
        }
        OpKind::RmsNorm { .. } => {
            let [x, weight] = rule.operands([&[2], &[1]])?;
            rule.multiple("last dimension", x[1], rule.fixed("weight", weight[0])?)?;
            vec![x.to_vec()]
        }
        OpKind::Matmul => {
            let [x, weight] = rule.operands([&[2], &[2]])?;
            rule.same("inner dimension", weight[1], x[1])?;
            vec![vec![x[0], weight[0]]]
        }
        OpKind::Split { sizes, block } => {
            let [x] = rule.operands([&[1, 2, 3]])?;
            let (last, outer) = x.split_last().expect("rank is at least 1");
            let sum = sizes.iter().try_fold(0u64, |sum, &n| sum.checked_add(n)).ok_or("sizes overflow")?;
            rule.same("sum of `sizes`", Dim::fixed(sum), *last)?;
            if sizes.is_empty() || sizes.contains(&0) {
                return Err("`sizes` must be positive".into());
            }
            if let Some(block) = *block
                && (block == 0 || sizes.iter().any(|&n| n != sizes[0] || n % block != 0))
            {
                return Err(format!("`block = {block}` needs equal sizes that it divides, found {sizes:?}"));
            }
            sizes.iter().map(|&n| [outer, &[Dim::fixed(n)]].concat()).collect()
        }
        OpKind::Unary(_) | OpKind::Cast => vec![rule.operands([&[0, 1, 2, 3]])?[0].to_vec()],
        OpKind::Binary(_) => {
            let [x, y] = rule.operands([&[0, 1, 2, 3], &[0, 1, 2, 3]])?;
            vec![broadcast(x, y).ok_or_else(|| format!("operands {} and {} do not broadcast", show(x), show(y)))?]
        }
        OpKind::Conv1dCausal => {
            let [u, weight, state, pos, slot] = rule.operands([&[2], &[2], &[3], &[1], &[1]])?;
            rule.same("channels of the weight", weight[0], u[1])?;
            rule.same("channels of the state", state[2], u[1])?;
            rule.rows(u[0], &[pos, slot])?;
            let (taps, ring) = (rule.fixed("taps", weight[1])?, rule.fixed("ring", state[1])?);
            if taps == 0 || ring < taps {
                return Err(format!("a ring of {ring} columns does not hold the {taps} taps"));
            }
            vec![u.to_vec(), state.to_vec()]
        }
        OpKind::Rope { head_dim, .. } => {
            let [x, pos] = rule.operands([&[2], &[1]])?;
            rule.rows(x[0], &[pos])?;
            if *head_dim == 0 || head_dim % 2 != 0 {
                return Err(format!("`head_dim` must be even and positive, found {head_dim}"));
            }
            rule.multiple("last dimension", x[1], *head_dim)?;
            vec![x.to_vec()]
        }
        OpKind::KvWrite => {
            let [k, v, kv, table, pos, slot] = rule.operands([&[2], &[2], &[5], &[2], &[1], &[1]])?;
            rule.same("width of v", v[1], k[1])?;
            rule.rows(k[0], &[v, pos, slot])?;
            rule.cache(kv, table)?;
            rule.same("width of k", k[1], kv[2].times(rule.fixed("head size", kv[4])?).ok_or("overflow")?)?;
            vec![kv.to_vec()]
        }
        OpKind::Attention { heads, .. } => {
            let [q, kv, table, pos, slot] = rule.operands([&[2], &[5], &[2], &[1], &[1]])?;
            rule.rows(q[0], &[pos, slot])?;
            rule.cache(kv, table)?;
            let head_dim = rule.fixed("head size", kv[4])?;
            rule.same("width of q", q[1], Dim::fixed(heads.checked_mul(head_dim).ok_or("overflow")?))?;
            rule.multiple("`heads`", Dim::fixed(*heads), rule.fixed("KV heads", kv[2])?)?;
            vec![q.to_vec()]
        }
        OpKind::TopK { k } => {
            let [scores, slot] = rule.operands([&[2], &[1]])?;
            rule.rows(scores[0], &[slot])?;
            let columns = rule.fixed("columns", scores[1])?;
            if *k == 0 || *k > columns {
                return Err(format!("`k = {k}` is not between 1 and {columns} columns"));
            }
            vec![vec![scores[0], Dim::fixed(*k)]]
        }
        OpKind::GatherRows => {
            let [x, rows] = rule.operands([&[2], &[1]])?;
            vec![vec![rows[0], x[1]]]
        }
        OpKind::GatherColumns => {
            let [x, columns] = rule.operands([&[2], &[2]])?;
            rule.rows(x[0], &[columns])?;
            vec![columns.to_vec()]
        }
        OpKind::RowSum => {
            let [x] = rule.operands([&[1, 2, 3]])?;
            vec![[&x[..x.len() - 1], &[Dim::fixed(1)]].concat()]
        }
        OpKind::ExpertMatmul => {
            let [x, weight, experts] = rule.operands([&[2, 3], &[3], &[2]])?;
            rule.rows(x[0], &[experts])?;
            if x.len() == 3 {
                rule.same("experts a token", x[1], experts[1])?;
            }
            rule.same("inner dimension", weight[2], x[x.len() - 1])?;
            vec![vec![x[0], experts[1], weight[1]]]
        }
        OpKind::WeightedSum => {
            let [y, weights, experts] = rule.operands([&[3], &[2], &[2]])?;
            rule.rows(y[0], &[weights, experts])?;
            rule.same("experts a token", weights[1], y[1])?;
            rule.same("experts a token", experts[1], y[1])?;
            vec![vec![y[0], y[2]]]
        }
        OpKind::GroupRows { experts: count } => {
            let [experts] = rule.operands([&[2]])?;
            let k = rule.fixed("experts a token", experts[1])?;
            let pairs = experts[0].times(k).ok_or("overflow")?;
            vec![vec![pairs], experts.to_vec(), vec![Dim::fixed(count.checked_add(1).ok_or("overflow")?)]]
        }
        OpKind::GatherPairs { k } => {
            let [x, pairs] = rule.operands([&[2], &[1]])?;
            rule.same("number of pairs", pairs[0], x[0].times(*k).ok_or("overflow")?)?;
            vec![vec![pairs[0], x[1]]]
        }
        OpKind::GroupedMatmulGather { k } => {
            let [x, weight, pairs, offsets] = rule.operands([&[2], &[3], &[1], &[1]])?;
            rule.same("number of pairs", pairs[0], x[0].times(*k).ok_or("overflow")?)?;
            rule.grouped(x[1], weight, offsets)?;
            vec![vec![pairs[0], weight[1]]]
        }
        OpKind::GroupedMatmul => {
            let [x, weight, offsets] = rule.operands([&[2], &[3], &[1]])?;
            rule.grouped(x[1], weight, offsets)?;
            vec![vec![x[0], weight[1]]]
        }
        OpKind::GroupedWeightedSum => {
            let [y, weights, places] = rule.operands([&[2], &[2], &[2]])?;
            rule.rows(weights[0], &[places])?;
            rule.same("experts a token", places[1], weights[1])?;
            let k = rule.fixed("experts a token", weights[1])?;
            rule.same("number of pairs", y[0], weights[0].times(k).ok_or("overflow")?)?;
            vec![vec![weights[0], y[1]]]
        }
        OpKind::AllGather { ranks } => {
            positive("ranks", *ranks)?;
            if operands.is_empty() {
                return Err("`all_gather` takes at least 1 operand, found 0".into());
            }
            operands.iter().map(|x| times_rows(x, *ranks)).collect::<Result<_, _>>()?
        }
        OpKind::AllToAll { ranks } => {
            let [x] = rule.operands([&[2]])?;
            rule.blocks("ranks", x[0], *ranks)?;
            vec![x.to_vec()]
        }
        OpKind::Send { to, ranks } => {
            peer("to", *to, *ranks)?;
            let (link, sent) = linked(kind, operands)?;
            payload("operands behind the link", sent)?;
            vec![link.shape.clone()]
        }
        OpKind::Receive { .. } => return Err("what is received has the shapes of what is sent".into()),
        OpKind::LocalExperts { of, experts, parts } => {
            let chosen = if parts.is_empty() {
                let [chosen] = rule.operands([&[2]])?;
                chosen
            } else {
                let [chosen, weights] = rule.operands([&[2], &[2]])?;
                if (operands[1].dtype, weights) != (DType::F32, chosen) {
                    return Err(format!("operand 1: expected f32{}, found {}", show(chosen), operands[1]));
                }
                chosen
            };
            if experts.is_empty() || !experts.is_sorted_by(|a, b| a < b) || experts.last() >= Some(of) {
                return Err(format!(
                    "`experts`: expected ascending numbers below {of}, at least one, found {experts:?}"
                ));
            }
            if !parts.is_empty() && parts.len() != experts.len() {
                return Err(format!(
                    "`from`: expected {} numbers, as of `experts`, found {}",
                    experts.len(),
                    parts.len()
                ));
            }
            if let Some((from, to)) = parts.iter().find(|(from, to)| from > to || *to > TURNS) {
                return Err(format!(
                    "`from` and `to`: expected ascending numbers up to {TURNS}, found {from} and {to}"
                ));
            }
            vec![chosen.to_vec()]
        }
        OpKind::BlockSum { blocks } => {
            let [x] = rule.operands([&[2]])?;
            vec![vec![rule.blocks("blocks", x[0], *blocks)?, x[1]]]
        }
        OpKind::Sample => {
            let [_, rows, pos, slot, params] = rule.operands([&[2], &[1], &[1], &[1], &[2]])?;
            rule.rows(pos[0], &[slot])?;
            rule.rows(operands[0].shape[0], &[rows])?;
            rule.same("parameter columns", params[1], Dim::fixed(SAMPLING_COLUMNS))?;
            vec![vec![rows[0]]]
        }
        OpKind::Fused(_) => return Err("a fused operator has the shapes of its body".into()),
    })
}

/// Checks a primitive operator's results: count, shapes and element types. All faults at once.
pub fn check(kind: &OpKind, operands: &[Type], results: &[Type]) -> Vec<String> {
    if let OpKind::Receive { from, ranks } = kind {
        return peer("from", *from, *ranks)
            .and_then(|()| received(kind, operands, results))
            .err()
            .into_iter()
            .collect();
    }
    let shapes = match result_shapes(kind, operands) {
        Ok(shapes) => shapes,
        Err(fault) => return vec![fault],
    };
    if shapes.len() != results.len() {
        return vec![format!("`{}` has {} results, found {}", kind.mnemonic(), shapes.len(), results.len())];
    }
    let mut faults = vec![];
    for (i, (shape, result)) in shapes.iter().zip(results).enumerate() {
        if *shape != result.shape {
            faults.push(format!("result {i}: expected shape {}, found {}", show(shape), show(&result.shape)));
        }
        if let Err(fault) = check_dtype(kind, operands, i, result.dtype) {
            faults.push(fault);
        }
    }
    faults
}

fn check_dtype(kind: &OpKind, operands: &[Type], result: usize, found: DType) -> Result<(), String> {
    let expected = match kind {
        OpKind::TopK { .. } | OpKind::GroupRows { .. } | OpKind::LocalExperts { .. } | OpKind::Sample => {
            Some(DType::I32)
        }
        OpKind::Split { .. } | OpKind::GatherRows | OpKind::GatherColumns | OpKind::GatherPairs { .. } => {
            Some(operands[0].dtype)
        }
        OpKind::AllGather { .. } => Some(operands[result].dtype),
        OpKind::AllToAll { .. } | OpKind::Send { .. } => Some(operands[0].dtype),
        OpKind::Conv1dCausal if result == 1 => Some(operands[2].dtype),
        OpKind::KvWrite => Some(operands[2].dtype),
        _ => None,
    };
    match expected {
        Some(expected) if expected != found => {
            Err(format!("result {result}: expected element type {expected}, found {found}"))
        }
        None if !found.is_float() => Err(format!("result {result}: expected a float type, found {found}")),
        _ => Ok(()),
    }
}

fn broadcast(x: &[Dim], y: &[Dim]) -> Option<Vec<Dim>> {
    let rank = x.len().max(y.len());
    let at = |shape: &[Dim], i: usize| (i + shape.len()).checked_sub(rank).map_or(Dim::fixed(1), |i| shape[i]);
    (0..rank)
        .map(|i| match (at(x, i), at(y, i)) {
            (a, b) if a == b => Some(a),
            (a, b) if a == Dim::fixed(1) => Some(b),
            (a, b) if b == Dim::fixed(1) => Some(a),
            _ => None,
        })
        .collect()
}

/// The shape with so many times the rows.
fn times_rows(x: &Type, times: u64) -> Result<Vec<Dim>, String> {
    let (rows, inner) = x.shape.split_first().ok_or("expected rows, found a scalar")?;
    Ok([&[rows.times(times).ok_or("overflow")?], inner].concat())
}

/// Checks the number of another rank.
fn peer(what: &str, number: u64, ranks: u64) -> Result<(), String> {
    if number < ranks { Ok(()) } else { Err(format!("`{what}`: expected a rank below {ranks}, found {number}")) }
}

/// The link of an exchange, and what follows it.
fn linked<'a>(kind: &OpKind, types: &'a [Type]) -> Result<(&'a Type, &'a [Type]), String> {
    match types.split_first() {
        Some((link, rest)) if *link == Type::new(DType::I32, [1u64]) => Ok((link, rest)),
        found => {
            let found = found.map_or("none".into(), |(link, _)| link.to_string());
            Err(format!("`{}`: expected a link i32[1] first, found {found}", kind.mnemonic()))
        }
    }
}

/// Checks what one rank sends another: numbers, then positions and slots or neither, then pages or none.
fn payload(what: &str, types: &[Type]) -> Result<(), String> {
    let numbers = types.iter().take_while(|ty| ty.dtype.is_float()).count();
    let of_rank = |ty: &Type, rank: usize| ty.dtype == DType::I32 && ty.shape.len() == rank;
    let holds = match &types[numbers..] {
        [] => numbers > 0,
        [pos, slot, rest @ ..] if of_rank(pos, 1) && pos == slot => match rest {
            [] => true,
            [pages] => of_rank(pages, 2),
            _ => false,
        },
        _ => false,
    };
    let found: Vec<String> = types.iter().map(ToString::to_string).collect();
    let expected = "expected numbers, then positions and slots of rows or neither, then pages or none";
    if holds { Ok(()) } else { Err(format!("{what}: {expected}, found {}", found.join(", "))) }
}

fn received(kind: &OpKind, operands: &[Type], results: &[Type]) -> Result<(), String> {
    if operands.len() != 1 {
        return Err(format!("`{}` takes 1 operand, found {}", kind.mnemonic(), operands.len()));
    }
    linked(kind, operands)?;
    payload("results behind the link", linked(kind, results)?.1)
}
