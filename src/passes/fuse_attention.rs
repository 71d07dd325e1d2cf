//! `fuse-attention`: norms of heads, RoPE and the cache write as one operator, together with the attention over that cache
//! where one launch can do both.
//!
//! Needs: nothing; with q, k and v merged, their split is taken in too. Leaves: `headrope+kvwrite+attention`; where
//! [`tactics::attention_with_prep`] says no, `headrope+kvwrite` and `attention`.

use crate::ir::{Graph, Op, OpKind, Operand, Stage, Users, ValueId};
use crate::passes::view::{View, only_result};
use crate::passes::{PassContext, Patch, Rewrite, tactics};

/// The pass.
pub struct FuseAttention;

impl Rewrite for FuseAttention {
    fn propose(&self, graph: &Graph, users: &Users, at: usize, context: &PassContext) -> Option<Patch> {
        let view = View::new(graph, users);
        let write = view.op(at);
        if write.kind != OpKind::KvWrite {
            return None;
        }
        let [k, v, kv, table, pos, slot] = write.operands[..] else { return None };
        let cache = only_result(write)?;
        let attends = |op: &Op| {
            matches!(op.kind, OpKind::Attention { .. }) && op.operands[1..] == [cache.into(), table, pos, slot]
        };
        let attention = view.users.of(cache).iter().copied().find(|&user| attends(view.op(user)))?;
        let head_dim = view.graph.ty(kv.value()?).last()?;
        let query = heads(view, view.op(attention).operands[0], attention, pos, head_dim)?;
        let key = heads(view, k, at, pos, head_dim)?;

        let mut members = vec![query.norm, query.rope, key.norm, key.rope, at];
        members.extend(merged(view, [(query.raw, query.norm), (key.raw, key.norm), (v.value()?, at)]));
        let mut stages = vec![Stage::HeadRope, Stage::KvWrite];
        if tactics::attention_with_prep(context) {
            members.push(attention);
            stages.push(Stage::Attention);
        }
        view.fuse(&members, stages)
    }
}

/// `rope(rms_norm(raw))`, by heads.
struct Heads {
    raw: ValueId,
    norm: usize,
    rope: usize,
}

fn heads(view: View, operand: Operand, user: usize, pos: Operand, head_dim: u64) -> Option<Heads> {
    let (rope, rotation) = view.private_producer(operand, user)?;
    let (norm, normed) = view.private_producer(*rotation.operands.first()?, rope)?;
    let (OpKind::Rope { head_dim: rotated, .. }, OpKind::RmsNorm { .. }) = (&rotation.kind, &normed.kind) else {
        return None;
    };
    let [raw, weight] = normed.operands[..] else { return None };
    let by_heads = *rotated == head_dim && view.graph.weight(weight.weight()?).ty.last()? == head_dim;
    (by_heads && rotation.operands.get(1) == Some(&pos)).then_some(Heads { raw: raw.value()?, norm, rope })
}

/// The split that makes q, k and v, in this order, for these users only.
fn merged(view: View, parts: [(ValueId, usize); 3]) -> Option<usize> {
    let split = view.users.definition(parts[0].0)?;
    let op = view.op(split);
    let is_split = matches!(op.kind, OpKind::Split { block: None, .. });
    let private = parts.iter().all(|&(part, user)| view.users.only(part) == Some(user));
    (is_split && private && op.results == parts.map(|(part, _)| part)).then_some(split)
}
