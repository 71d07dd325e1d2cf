//! `kernels/pointwise.cu`: any elementwise expression, as generated code.

use std::fmt::Write;

use super::builder::{Builder, Specialised, c_type};
use super::expression::Registers;
use super::hopper::PROCESSORS;
use super::pattern::{only, results, ty};
use super::{Problem, Twin};
use crate::plan::{Instr, Op, TensorType};

/// The twin.
pub struct Pointwise;

const THREADS: u32 = 256;
/// Blocks for which the device has room at once, or nearly: beyond them a block does several parts.
const MOST_BLOCKS: u64 = PROCESSORS * 16;

impl Twin for Pointwise {
    fn name(&self) -> &'static str {
        "pointwise"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/pointwise.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        [4, 8, 1].into_iter().filter_map(|vector| specialise(problem, vector)).collect()
    }
}

fn specialise(problem: &Problem, vector: u64) -> Option<Specialised> {
    let semantic = problem.semantic;
    let instr @ Instr(Op::Pointwise(exprs), arguments, _) = only(semantic)? else { return None };
    let [result] = results(instr)?;
    let out = ty(semantic, result);
    let count = out.elements()?;
    let operands: Vec<&TensorType> = arguments.iter().map(|&slot| ty(semantic, slot)).collect();
    let grid = Axes::new(&operands, out)?;
    if !grid.width.is_multiple_of(vector) || count > i32::MAX as u64 {
        return None;
    }
    let mut builder = Builder::new(problem);
    builder.constant("VECTOR", vector).alias("Y", out.0).pointer("y", result);
    let (mut loads, mut values) = (String::new(), vec![]);
    let (mut formal, mut actual) = (String::from("Y* y"), String::from("y"));
    for (i, (&slot, operand)) in arguments.iter().zip(&operands).enumerate() {
        builder.pointer(&format!("x{i}"), slot);
        let c = c_type(operand.0);
        write!(formal, ", const {c}* x{i}").expect("writing to a String");
        write!(actual, ", x{i}").expect("writing to a String");
        let index = grid.index(i);
        if grid.advances(i) {
            writeln!(loads, "    Pack<{c}, VECTOR> p{i} = *(const Pack<{c}, VECTOR>*)(x{i} + {index});")
                .expect("writing to a String");
            values.push(format!("to_f32(p{i}.at[j])"));
        } else {
            writeln!(loads, "    float p{i} = to_f32(x{i}[{index}]);").expect("writing to a String");
            values.push(format!("p{i}"));
        }
    }
    builder.int("count", count);
    let mut registers = Registers::default();
    let last = registers.expression(exprs, &values);
    let store =
        if matches!(out.0, crate::plan::DType::I32) { format!("(int){last}") } else { format!("from_f32<Y>({last})") };
    builder.line(format_args!(
        "__device__ __forceinline__ void compute(i64 i, {formal}) {{\n{loads}    Pack<Y, VECTOR> out;\n#pragma unroll\n    \
         for (int j = 0; j < VECTOR; j++) {{\n{}    out.at[j] = {store};\n    }}\n    *(Pack<Y, VECTOR>*)(y + i) = out;\n}}",
        registers.text
    ));
    builder.line(format_args!("#define COMPUTE(i) compute(i, {actual})"));
    let blocks = (count / vector).div_ceil(u64::from(THREADS)).min(MOST_BLOCKS);
    Some(builder.finish(format!("vector={vector}"), [blocks, 1, 1], THREADS, 0))
}

/// The result's axes, neighbours joined where every operand allows it.
struct Axes {
    /// Size of the innermost.
    width: u64,
    /// Sizes of the others, the outermost first.
    outer: Vec<u64>,
    /// For each operand its strides along all of them, the innermost last; zero where it is broadcast.
    strides: Vec<Vec<u64>>,
}

impl Axes {
    fn new(operands: &[&TensorType], out: &TensorType) -> Option<Axes> {
        let strides: Vec<Vec<u64>> = operands.iter().map(|ty| strides(&ty.1, &out.1)).collect::<Option<_>>()?;
        let mut joined: Vec<(u64, Vec<u64>)> = vec![];
        for (axis, &size) in out.1.iter().enumerate().rev().filter(|(_, size)| **size != 1) {
            let at: Vec<u64> = strides.iter().map(|s| s[axis]).collect();
            match joined.last_mut() {
                Some((inner, inner_at)) if at.iter().zip(&*inner_at).all(|(&a, &b)| a == b * *inner) => *inner *= size,
                _ => joined.push((size, at)),
            }
        }
        if joined.is_empty() {
            joined.push((1, vec![0; operands.len()]));
        }
        joined.reverse();
        let strides = (0..operands.len()).map(|i| joined.iter().map(|(_, at)| at[i]).collect()).collect();
        let (width, _) = joined.pop()?;
        Some(Axes { width, outer: joined.into_iter().map(|(size, _)| size).collect(), strides })
    }

    fn advances(&self, operand: usize) -> bool {
        self.strides[operand].last() == Some(&1)
    }

    /// C++ for an operand's index of the result's element `i`. The outermost axis' size does not occur, so that buckets share
    /// the kernel.
    fn index(&self, operand: usize) -> String {
        let strides = &self.strides[operand];
        let mut terms = vec![];
        let mut below = 1;
        let sizes: Vec<u64> = self.outer.iter().copied().chain([self.width]).collect();
        for (axis, &size) in sizes.iter().enumerate().rev() {
            if strides[axis] != 0 {
                let divided = if below == 1 { "i".into() } else { format!("i / {below}") };
                let wrapped = if axis == 0 { divided } else { format!("({divided}) % {size}") };
                terms.push(if strides[axis] == 1 { wrapped } else { format!("({wrapped}) * {}", strides[axis]) });
            }
            below *= size;
        }
        if terms.is_empty() { "0".into() } else { terms.join(" + ") }
    }
}

/// Strides of a dense operand along the result's axes, zero where it is broadcast; none if the shapes do not fit.
fn strides(shape: &[u64], result: &[u64]) -> Option<Vec<u64>> {
    let missing = result.len().checked_sub(shape.len())?;
    let mut strides = vec![0; result.len()];
    let mut stride = 1;
    for (axis, &size) in shape.iter().enumerate().rev() {
        if size != 1 {
            if size != result[missing + axis] {
                return None;
            }
            strides[missing + axis] = stride;
        }
        stride *= size;
    }
    Some(strides)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{DType, Expr, Phase, Semantic, Slot, UnaryFn};

    fn semantic(inputs: Vec<Vec<u64>>, output: Vec<u64>) -> Semantic {
        let arguments: Vec<Slot> = (0..inputs.len() as u32).map(Slot::In).collect();
        let exprs = vec![Expr::Arg(inputs.len() as u32 - 1), Expr::Unary(UnaryFn::Tanh, 0)];
        Semantic {
            name: "pointwise".into(),
            inputs: inputs.into_iter().map(|shape| TensorType(DType::BF16, shape)).collect(),
            outputs: vec![TensorType(DType::F32, output)],
            temps: vec![],
            body: vec![Instr(Op::Pointwise(exprs), arguments, vec![Slot::Out(0)])],
        }
    }

    #[test]
    fn rows_do_not_occur_in_the_text_so_that_buckets_share_a_kernel() {
        let text = |rows| {
            let semantic = semantic(vec![vec![rows, 8], vec![8], vec![rows, 1]], vec![rows, 8]);
            let problem = Problem { semantic: &semantic, phase: Phase::Fixed };
            Pointwise.candidates(&problem)[0].prelude()
        };
        assert_eq!(text(3), text(500));
        assert!(text(3).contains("x1 + (i) % 8") && text(3).contains("x2[i / 8]"), "{}", text(3));
    }

    #[test]
    fn a_width_that_no_vector_divides_goes_element_by_element() {
        let semantic = semantic(vec![vec![5, 7]], vec![5, 7]);
        let problem = Problem { semantic: &semantic, phase: Phase::Fixed };
        let found: Vec<String> = Pointwise.candidates(&problem).into_iter().map(|c| c.config).collect();
        assert_eq!(found, ["vector=1"]);
    }
}
