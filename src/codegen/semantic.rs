//! From an operator of the graph to what a step says that it computes.

use std::collections::HashMap;

use crate::codegen::types::{plan_dtype, tensor_type};
use crate::ir::{self, DType, Extents, Graph, Op, OpKind, Operand, ValueId};
use crate::plan::{Expr, Instr, Op as PlanOp, Semantic, Slot};

/// A semantic with what its inputs and outputs stand for.
pub struct Lowered {
    /// What the step computes.
    pub semantic: Semantic,
    /// The operand behind each input; a state stands as its first version.
    pub inputs: Vec<Operand>,
    /// The value behind each output.
    pub outputs: Vec<ValueId>,
    /// The states that are updated, as first versions.
    pub updates: Vec<ValueId>,
}

/// Lowers one operator. `roots` maps each version of a state to its first.
pub fn lower(graph: &Graph, op: &Op, roots: &HashMap<ValueId, ValueId>, extents: &Extents) -> Result<Lowered, String> {
    let mut lowering = Lowering { graph, roots, slots: HashMap::new(), weights: vec![], inputs: vec![], temps: vec![] };
    let updated: Vec<ValueId> = op.state_updates().iter().filter_map(|(_, new)| roots.get(new).copied()).collect();
    for operand in &op.operands {
        lowering.add_input(*operand);
    }
    let outputs: Vec<ValueId> = op.results.iter().copied().filter(|value| !roots.contains_key(value)).collect();
    for (i, &value) in outputs.iter().enumerate() {
        lowering.slots.insert(value, Slot::Out(i as u32));
    }
    let all_pointwise = op.primitives().iter().all(|inner| inner.kind.is_pointwise());
    let body = match outputs[..] {
        [output] if all_pointwise => vec![lowering.expression(op.primitives(), output)?],
        _ => op.primitives().iter().map(|inner| lowering.instruction(inner)).collect::<Result<_, _>>()?,
    };
    let types = |values: &[ValueId]| {
        values.iter().map(|&value| tensor_type(graph.ty(value), extents)).collect::<Result<Vec<_>, _>>()
    };
    let name = match &op.kind {
        OpKind::Fused(stages) => ir::stage_list(stages),
        kind => kind.mnemonic().to_owned(),
    };
    let semantic = Semantic {
        name,
        inputs: lowering
            .inputs
            .iter()
            .map(|operand| tensor_type(&graph.operand_type(operand), extents))
            .collect::<Result<_, _>>()?,
        outputs: types(&outputs)?,
        temps: types(&lowering.temps)?,
        body,
    };
    Ok(Lowered { semantic, inputs: lowering.inputs, outputs, updates: updated })
}

struct Lowering<'a> {
    graph: &'a Graph,
    roots: &'a HashMap<ValueId, ValueId>,
    slots: HashMap<ValueId, Slot>,
    weights: Vec<(ir::WeightId, Slot)>,
    inputs: Vec<Operand>,
    temps: Vec<ValueId>,
}

impl Lowering<'_> {
    fn root(&self, value: ValueId) -> ValueId {
        self.roots.get(&value).copied().unwrap_or(value)
    }

    fn add_input(&mut self, operand: Operand) {
        let slot = Slot::In(self.inputs.len() as u32);
        match operand {
            Operand::Value(value) => {
                let root = self.root(value);
                if self.slots.contains_key(&root) {
                    return;
                }
                self.slots.insert(root, slot);
                self.inputs.push(Operand::Value(root));
            }
            Operand::Weight(weight) => {
                if self.weights.iter().any(|(known, _)| *known == weight) {
                    return;
                }
                self.weights.push((weight, slot));
                self.inputs.push(operand);
            }
            Operand::Const(_) => {}
        }
    }

    fn argument(&self, operand: Operand) -> Result<Slot, String> {
        let found = match operand {
            Operand::Value(value) => self.slots.get(&self.root(value)).copied(),
            Operand::Weight(weight) => self.weights.iter().find(|(known, _)| *known == weight).map(|(_, slot)| *slot),
            Operand::Const(_) => None,
        };
        found.ok_or_else(|| format!("operand {operand:?} is not an input of its step"))
    }

    fn result(&mut self, value: ValueId) -> Slot {
        if let Some(&slot) = self.slots.get(&value) {
            return slot;
        }
        let slot = Slot::Temp(self.temps.len() as u32);
        self.temps.push(value);
        self.slots.insert(value, slot);
        slot
    }

    fn instruction(&mut self, op: &Op) -> Result<Instr, String> {
        if op.kind.is_pointwise() {
            return self.expression(std::slice::from_ref(op), op.results[0]);
        }
        let arguments = op.operands.iter().map(|&operand| self.argument(operand)).collect::<Result<_, _>>()?;
        let results = op.results.iter().filter(|value| !self.roots.contains_key(value)).copied().collect::<Vec<_>>();
        let results = results.into_iter().map(|value| self.result(value)).collect();
        Ok(Instr(plan_op(&op.kind)?, arguments, results))
    }

    /// Elementwise operators as one expression that gives `output`. Values between them are rounded where the graph stores
    /// them in a narrower type, so that fusing changes no bit.
    fn expression(&mut self, ops: &[Op], output: ValueId) -> Result<Instr, String> {
        let mut arguments: Vec<Slot> = vec![];
        let mut registers: Vec<Expr> = vec![];
        let mut values: HashMap<ValueId, u32> = HashMap::new();
        for op in ops {
            let mut operands = vec![];
            for &operand in &op.operands {
                let known = operand.value().and_then(|value| values.get(&value).copied());
                operands.push(match (known, operand) {
                    (Some(register), _) => register,
                    (None, Operand::Const(x)) => push(&mut registers, Expr::Const(x as f32)),
                    (None, _) => {
                        let slot = self.argument(operand)?;
                        let at = arguments.iter().position(|known| *known == slot).unwrap_or_else(|| {
                            arguments.push(slot);
                            arguments.len() - 1
                        });
                        let register = push(&mut registers, Expr::Arg(at as u32));
                        if let Operand::Value(value) = operand {
                            values.insert(value, register);
                        }
                        register
                    }
                });
            }
            let mut register = match op.kind {
                OpKind::Unary(function) => push(&mut registers, Expr::Unary(unary(function), operands[0])),
                OpKind::Binary(function) => {
                    push(&mut registers, Expr::Binary(binary(function), operands[0], operands[1]))
                }
                _ => operands[0],
            };
            let result = op.results[0];
            let stored = self.graph.ty(result).dtype;
            if result != output && stored != DType::F32 {
                register = push(&mut registers, Expr::Round(register, plan_dtype(stored)));
            }
            values.insert(result, register);
        }
        let last = *values.get(&output).ok_or("the expression does not give the output")?;
        if last as usize + 1 != registers.len() {
            // The result is the last register by definition; adding nothing keeps it exact.
            let kept = registers[last as usize];
            registers.push(kept);
        }
        let result = self.result(output);
        Ok(Instr(PlanOp::Pointwise(registers), arguments, vec![result]))
    }
}

fn push(registers: &mut Vec<Expr>, expr: Expr) -> u32 {
    registers.push(expr);
    (registers.len() - 1) as u32
}

fn plan_op(kind: &OpKind) -> Result<PlanOp, String> {
    Ok(match *kind {
        OpKind::AllGather { ranks } => PlanOp::AllGather { ranks },
        OpKind::AllToAll { ranks } => PlanOp::AllToAll { ranks },
        OpKind::Send { to, ranks } => PlanOp::Send { to, ranks },
        OpKind::Receive { from, ranks } => PlanOp::Receive { from, ranks },
        OpKind::LocalExperts { of, ref experts, ref parts } => {
            PlanOp::LocalExperts { of, experts: experts.clone(), parts: parts.clone() }
        }
        OpKind::BlockSum { blocks } => PlanOp::BlockSum { blocks },
        OpKind::Embed => PlanOp::Embed,
        OpKind::RmsNorm { eps } => PlanOp::RmsNorm { eps },
        OpKind::Matmul => PlanOp::Matmul,
        OpKind::Split { block, .. } => PlanOp::Split { block },
        OpKind::Conv1dCausal => PlanOp::Conv1dCausal,
        OpKind::Rope { theta, head_dim } => PlanOp::Rope { theta, head_dim },
        OpKind::KvWrite => PlanOp::KvWrite,
        OpKind::Attention { heads, scale } => PlanOp::Attention { heads, scale },
        OpKind::TopK { .. } => PlanOp::TopK,
        OpKind::GatherRows => PlanOp::GatherRows,
        OpKind::GatherColumns => PlanOp::GatherColumns,
        OpKind::RowSum => PlanOp::RowSum,
        OpKind::ExpertMatmul => PlanOp::ExpertMatmul,
        OpKind::WeightedSum => PlanOp::WeightedSum,
        OpKind::GroupRows { .. } => PlanOp::GroupRows,
        OpKind::GatherPairs { k } => PlanOp::GatherPairs { k },
        OpKind::GroupedMatmulGather { k } => PlanOp::GroupedMatmulGather { k },
        OpKind::GroupedMatmul => PlanOp::GroupedMatmul,
        OpKind::GroupedWeightedSum => PlanOp::GroupedWeightedSum,
        OpKind::Sample => PlanOp::Sample,
        OpKind::Unary(_) | OpKind::Binary(_) | OpKind::Cast | OpKind::Fused(_) => {
            return Err(format!("`{}` is no instruction", kind.mnemonic()));
        }
    })
}

fn unary(function: ir::UnaryFn) -> crate::plan::UnaryFn {
    use crate::plan::UnaryFn as To;
    match function {
        ir::UnaryFn::Neg => To::Neg,
        ir::UnaryFn::Abs => To::Abs,
        ir::UnaryFn::Exp => To::Exp,
        ir::UnaryFn::Log => To::Log,
        ir::UnaryFn::Sqrt => To::Sqrt,
        ir::UnaryFn::Rsqrt => To::Rsqrt,
        ir::UnaryFn::Tanh => To::Tanh,
        ir::UnaryFn::Sigmoid => To::Sigmoid,
        ir::UnaryFn::Silu => To::Silu,
        ir::UnaryFn::Relu => To::Relu,
    }
}

fn binary(function: ir::BinaryFn) -> crate::plan::BinaryFn {
    use crate::plan::BinaryFn as To;
    match function {
        ir::BinaryFn::Add => To::Add,
        ir::BinaryFn::Sub => To::Sub,
        ir::BinaryFn::Mul => To::Mul,
        ir::BinaryFn::Div => To::Div,
        ir::BinaryFn::Max => To::Max,
        ir::BinaryFn::Min => To::Min,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::parse;
    use crate::plan::{DType as PlanDType, TensorType};

    const EXTENTS: Extents = Extents { tokens: 3, sequences: 2, rows: 1 };

    /// The last operator of a graph, lowered.
    fn lowered(text: &str) -> Lowered {
        let graph = parse(text).unwrap_or_else(|fault| panic!("{fault}")).graph;
        crate::ir::verify(&graph).unwrap_or_else(|faults| panic!("{faults}"));
        let op = graph.ops.last().expect("the graph has operators");
        lower(&graph, op, &graph.state_roots(), &EXTENTS).expect("the operator can be lowered")
    }

    #[test]
    fn a_chain_becomes_one_expression_that_rounds_where_the_graph_stores() {
        let found = lowered(
            "graph @g (%x: bf16[T,8], %y: bf16[T,8]) {
              %z = fused[pointwise] %x, %y : f32[T,8] {
                %s = silu %x : bf16[T,8]
                %m = mul %s, %y : f32[T,8]
                %z = mul %m, 0.5 : f32[T,8]
              }
              return %z
            }",
        );
        let [Instr(PlanOp::Pointwise(registers), arguments, results)] = &found.semantic.body[..] else {
            panic!("{:?}", found.semantic.body)
        };
        let expected = [
            Expr::Arg(0),
            Expr::Unary(crate::plan::UnaryFn::Silu, 0),
            Expr::Round(1, PlanDType::BF16),
            Expr::Arg(1),
            Expr::Binary(crate::plan::BinaryFn::Mul, 2, 3),
            Expr::Const(0.5),
            Expr::Binary(crate::plan::BinaryFn::Mul, 4, 5),
        ];
        assert_eq!(registers[..], expected);
        assert_eq!((&arguments[..], &results[..]), (&[Slot::In(0), Slot::In(1)][..], &[Slot::Out(0)][..]));
        assert!(found.semantic.temps.is_empty());
        assert_eq!(found.semantic.inputs, vec![TensorType(PlanDType::BF16, vec![3, 8]); 2], "symbols are bound");
    }

    #[test]
    fn an_operand_taken_twice_is_one_input() {
        let found = lowered("graph @g (%x: f32[T,8]) {\n%y = mul %x, %x : f32[T,8]\nreturn %y\n}");
        assert_eq!(found.semantic.inputs.len(), 1);
        let squared = vec![Expr::Arg(0), Expr::Binary(crate::plan::BinaryFn::Mul, 0, 0)];
        assert_eq!(found.semantic.body, [Instr(PlanOp::Pointwise(squared), vec![Slot::In(0)], vec![Slot::Out(0)])]);
    }

    #[test]
    fn what_stays_inside_is_a_temporary() {
        let found = lowered(
            "graph @g (%x: f32[T,8]) {
              weight @n : f32[8]
              weight @w : f32[4,8]
              %y = fused[norm+matmul] %x, @n, @w : f32[T,4] {
                %h = rms_norm %x, @n {eps = 1e-5} : f32[T,8]
                %y = matmul %h, @w : f32[T,4]
              }
              return %y
            }",
        );
        let expected = [
            Instr(PlanOp::RmsNorm { eps: 1e-5 }, vec![Slot::In(0), Slot::In(1)], vec![Slot::Temp(0)]),
            Instr(PlanOp::Matmul, vec![Slot::Temp(0), Slot::In(2)], vec![Slot::Out(0)]),
        ];
        assert_eq!((&found.semantic.body[..], &found.semantic.name[..]), (&expected[..], "norm+matmul"));
        assert_eq!(found.semantic.temps, [TensorType(PlanDType::F32, vec![3, 8])]);
    }

    #[test]
    fn versions_of_a_state_are_one_input_updated_in_place() {
        let found = lowered(
            "graph @g (%q: f32[T,8], %k: f32[T,4], %v: f32[T,4], %pos: i32[T], %slot: i32[T]) {
              state %table : i32[2,3]
              state %kv : f32[5,2,1,64,4]
              %kv.next, %a = fused[kvwrite+attention] %k, %v, %kv, %table, %pos, %slot, %q : f32[5,2,1,64,4], f32[T,8] {
                %kv.next = kv_write %k, %v, %kv, %table, %pos, %slot : f32[5,2,1,64,4]
                %a = attention %q, %kv.next, %table, %pos, %slot {heads = 2, scale = 0.5} : f32[T,8]
              }
              return %a, %kv.next
            }",
        );
        let [Instr(PlanOp::KvWrite, write, made), Instr(PlanOp::Attention { .. }, attend, _)] =
            &found.semantic.body[..]
        else {
            panic!("{:?}", found.semantic.body)
        };
        assert!(made.is_empty(), "the state is written in place");
        assert_eq!((write[2], attend[1]), (Slot::In(2), Slot::In(2)), "both take the one state");
        assert_eq!((found.updates.len(), found.outputs.len()), (1, 1));
        assert_eq!(found.inputs[2], Operand::Value(found.updates[0]));
    }
}
