//! The exact text form: parsing what is printed gives the same graph, and printing that gives the same bytes.
//!
//! ```text
//! graph @name (%tokens: i32[T], %pos: i32[T]) {
//!   state %conv.0 : bf16[64,8,2048]
//!   weight @a : bf16[2048,2048]
//!   weight @b : bf16[2048,2048]
//!   weight @ab : bf16[4096,2048] = concat(@a, @b) {axis = 0, block = 16}
//!   weight @half : bf16[1024,2048] = take(@b) {indices = [0, 2, 4, ...]}
//!
//!   %x, %y = split %z {sizes = [8, 8]} : bf16[T,8], bf16[T,8] in layers.0.conv
//!   %m = mul %x, 0.5 : bf16[T,8]
//!   %p = fused[norm+matmul] %h, @n, @w : bf16[T,64] in layers.0.conv {
//!     %n = rms_norm %h, @n {eps = 1e-5} : bf16[T,32]
//!     %p = matmul %n, @w : bf16[T,64]
//!   }
//!   return %p, %conv.0.next
//! }
//! ```
//!
//! A comment runs from `;` to the end of its line; printing gives none.

use std::fmt::{self, Write};

use crate::ir::attributes::Attribute;
use crate::ir::{Graph, Layout, Op, OpKind, Operand, Stage, ValueId, WeightId};

/// Stands for what an id of a faulty graph does not refer to, so that errors can show such a graph.
const MISSING: &str = "<missing>";

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "graph @{} (", self.name)?;
        for (i, &input) in self.inputs.iter().enumerate() {
            write!(f, "{}%{}: {}", if i > 0 { ", " } else { "" }, self.value_name(input), self.type_text(input))?;
        }
        f.write_str(") {\n")?;
        for &state in &self.states {
            writeln!(f, "  state %{} : {}", self.value_name(state), self.type_text(state))?;
        }
        for weight in &self.weights {
            write!(f, "  weight @{} : {}", weight.name, weight.ty)?;
            match &weight.layout {
                Layout::Tensor => {}
                Layout::Concat { axis, block, parts } => {
                    f.write_str(" = concat(")?;
                    for (i, &part) in parts.iter().enumerate() {
                        write!(f, "{}@{}", if i > 0 { ", " } else { "" }, self.weight_name(part))?;
                    }
                    write!(f, ") {{axis = {axis}")?;
                    if let Some(block) = block {
                        write!(f, ", block = {block}")?;
                    }
                    f.write_str("}")?;
                }
                Layout::Take { of, indices } => {
                    write!(
                        f,
                        " = take(@{}) {{indices = {}}}",
                        self.weight_name(*of),
                        Attribute::Ints(indices.clone())
                    )?;
                }
            }
            f.write_str("\n")?;
        }
        if !self.states.is_empty() || !self.weights.is_empty() {
            f.write_str("\n")?;
        }
        for op in &self.ops {
            f.write_str(&self.print_op(op, "  "))?;
        }
        f.write_str("  return")?;
        self.values_list(f, &self.outputs)?;
        f.write_str("\n}\n")
    }
}

impl Graph {
    /// One operator as text, body included, each line behind `indent` and ended.
    pub fn print_op(&self, op: &Op, indent: &str) -> String {
        let mut text = String::new();
        self.write_op(&mut text, op, indent).expect("a String takes all text");
        text
    }

    fn write_op(&self, f: &mut String, op: &Op, indent: &str) -> fmt::Result {
        f.write_str(indent)?;
        for (i, &result) in op.results.iter().enumerate() {
            write!(f, "{}%{}", if i > 0 { ", " } else { "" }, self.value_name(result))?;
        }
        if !op.results.is_empty() {
            f.write_str(" = ")?;
        }
        f.write_str(op.kind.mnemonic())?;
        if let OpKind::Fused(stages) = &op.kind {
            write!(f, "[{}]", stage_list(stages))?;
        }
        for (i, operand) in op.operands.iter().enumerate() {
            f.write_str(if i > 0 { ", " } else { " " })?;
            match operand {
                Operand::Value(id) => write!(f, "%{}", self.value_name(*id))?,
                Operand::Weight(id) => write!(f, "@{}", self.weight_name(*id))?,
                Operand::Const(x) => write!(f, "{x:?}")?,
            }
        }
        let attributes = op.kind.attributes();
        if !attributes.is_empty() {
            f.write_str(" {")?;
            for (i, (name, value)) in attributes.iter().enumerate() {
                write!(f, "{}{name} = {value}", if i > 0 { ", " } else { "" })?;
            }
            f.write_str("}")?;
        }
        for (i, &result) in op.results.iter().enumerate() {
            write!(f, "{}{}", if i > 0 { ", " } else { " : " }, self.type_text(result))?;
        }
        if !op.scope.is_empty() {
            write!(f, " in {}", op.scope)?;
        }
        if matches!(op.kind, OpKind::Fused(_)) {
            f.write_str(" {\n")?;
            for inner in &op.body {
                self.write_op(f, inner, &format!("{indent}  "))?;
            }
            write!(f, "{indent}}}")?;
        }
        f.write_str("\n")
    }

    fn value_name(&self, id: ValueId) -> &str {
        self.values.get(id.index()).map_or(MISSING, |value| &value.name)
    }

    fn weight_name(&self, id: WeightId) -> &str {
        self.weights.get(id.index()).map_or(MISSING, |weight| &weight.name)
    }

    fn type_text(&self, id: ValueId) -> String {
        self.values.get(id.index()).map_or_else(|| MISSING.to_owned(), |value| value.ty.to_string())
    }

    fn values_list(&self, f: &mut fmt::Formatter<'_>, values: &[ValueId]) -> fmt::Result {
        for (i, &value) in values.iter().enumerate() {
            write!(f, "{}%{}", if i > 0 { ", " } else { " " }, self.value_name(value))?;
        }
        Ok(())
    }
}

/// Stages as the label of a fused operator: `norm+matmul`.
pub fn stage_list(stages: &[Stage]) -> String {
    stages.iter().map(ToString::to_string).collect::<Vec<_>>().join("+")
}
