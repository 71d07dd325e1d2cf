//! Elementwise expressions as C++: whole pointwise steps, and what follows a product in its kernel.
//!
//! Products and sums are written with the intrinsics that round each, so that no compiler fuses them: a fused chain gives
//! the bits of its parts.

use std::fmt::Write;

use super::builder::{Builder, c_number, c_type};
use super::pattern::{rows_and_last, ty};
use crate::plan::{BinaryFn, Expr, Instr, Op, Semantic, Slot, UnaryFn};

/// C++ statements that compute registers.
#[derive(Default)]
pub struct Registers {
    /// The statements.
    pub text: String,
    /// Whether exponentials and the divisions by them may be off by some units in the last place.
    pub fast: bool,
    count: usize,
}

impl Registers {
    /// A new register with this value.
    pub fn set(&mut self, value: &str) -> String {
        let name = format!("r{}", self.count);
        self.count += 1;
        writeln!(self.text, "    float {name} = {value};").expect("writing to a String");
        name
    }

    /// An expression over registers or other C++ values of its operands; gives the register of its result.
    pub fn expression(&mut self, exprs: &[Expr], operands: &[String]) -> String {
        let mut made: Vec<String> = vec![];
        for expr in exprs {
            let at = |i: u32| made[i as usize].as_str();
            let value = match *expr {
                Expr::Arg(i) => operands[i as usize].clone(),
                Expr::Const(x) => c_number(x),
                Expr::Round(x, dtype) => format!("rounded<{}>({})", c_type(dtype), at(x)),
                Expr::Unary(function, x) if self.fast => fast_unary(function, at(x)),
                Expr::Unary(function, x) => unary(function, at(x)),
                Expr::Binary(function, x, y) => binary(function, at(x), at(y)),
            };
            made.push(self.set(&value));
        }
        made.pop().expect("an expression has registers, by the plan's rules")
    }
}

fn unary(function: UnaryFn, x: &str) -> String {
    match function {
        UnaryFn::Neg => format!("-{x}"),
        UnaryFn::Abs => format!("fabsf({x})"),
        UnaryFn::Exp => format!("expf({x})"),
        UnaryFn::Log => format!("logf({x})"),
        UnaryFn::Sqrt => format!("sqrtf({x})"),
        UnaryFn::Rsqrt => format!("1.0f / sqrtf({x})"),
        UnaryFn::Tanh => format!("tanhf({x})"),
        UnaryFn::Sigmoid => format!("1.0f / (1.0f + expf(-{x}))"),
        UnaryFn::Silu => format!("{x} / (1.0f + expf(-{x}))"),
        UnaryFn::Relu => format!("fmaxf({x}, 0.0f)"),
    }
}

/// The same without branches, off by a few units in the last place of binary32.
fn fast_unary(function: UnaryFn, x: &str) -> String {
    match function {
        UnaryFn::Sigmoid => format!("__fdividef(1.0f, 1.0f + __expf(-{x}))"),
        UnaryFn::Silu => format!("__fdividef({x}, 1.0f + __expf(-{x}))"),
        other => unary(other, x),
    }
}

fn binary(function: BinaryFn, x: &str, y: &str) -> String {
    match function {
        BinaryFn::Add => format!("__fadd_rn({x}, {y})"),
        BinaryFn::Sub => format!("__fsub_rn({x}, {y})"),
        BinaryFn::Mul => format!("__fmul_rn({x}, {y})"),
        BinaryFn::Div => format!("{x} / {y}"),
        BinaryFn::Max => format!("fmaxf({x}, {y})"),
        BinaryFn::Min => format!("fminf({x}, {y})"),
    }
}

/// What follows a product in its kernel: a function of the product's elements at a row and column of the result.
///
/// [`Epilogue::declare`] writes, for `y [rows, N]`,
///
/// ```text
/// typedef bf16 Y;
/// constexpr int HALVES = 1, Y_COLUMNS = N;
/// float epilogue(float v0, float v1, i64 row, int column, ...)
/// #define EPILOGUE(v0, v1, row, column) epilogue(v0, v1, row, column, e0, ...)
/// ```
///
/// and adds the parameters `y` and `e0, e1, ...`. `HALVES` is 2 where the product's columns are two interleaved halves, in turn
/// [`Epilogue::block`] at a time: v0 is an element of the first, v1 the one at the same place of the second, and `column` counts
/// in one half. Else v1 is not used.
#[derive(Clone, PartialEq, Debug)]
pub struct Epilogue {
    /// The output that it makes.
    pub output: Slot,
    /// Size of the interleaved blocks, if the product is two halves.
    pub block: Option<u64>,
    /// Values read beside the product, and where, in terms of row and column.
    operands: Vec<(Slot, String)>,
    text: String,
    /// The same with [`Registers::fast`], if the result is of 16 bits, which do not show it.
    fast: String,
}

impl Epilogue {
    /// The epilogue that computes the rest of a body from the product in `product`; none if the rest is something else, or
    /// the product is needed beside it.
    pub fn new(semantic: &Semantic, rest: &[Instr], product: Slot) -> Option<Epilogue> {
        let exact = Epilogue::with(semantic, rest, product, false)?;
        match ty(semantic, exact.output).0.bytes() {
            2 => Some(Epilogue { fast: Epilogue::with(semantic, rest, product, true)?.text, ..exact }),
            _ => Some(exact),
        }
    }

    fn with(semantic: &Semantic, rest: &[Instr], product: Slot, fast: bool) -> Option<Epilogue> {
        let mut registers = Registers { fast, ..Registers::default() };
        let mut known: Vec<(Slot, String)> = vec![];
        let mut operands: Vec<(Slot, String)> = vec![];
        let mut rest = rest;
        let mut block = None;
        let stored = |registers: &mut Registers, value: &str, slot: Slot| match slot {
            Slot::Out(_) => value.to_owned(),
            _ => registers.set(&format!("rounded<{}>({value})", c_type(ty(semantic, slot).0))),
        };
        let v0 = stored(&mut registers, "v0", product);
        if let Some((Instr(Op::Split { block: size }, arguments, parts), after)) = rest.split_first()
            && arguments[..] == [product]
        {
            let [first, second] = parts[..] else { return None };
            if ty(semantic, first) != ty(semantic, second) {
                return None;
            }
            // Halves one after the other are blocks too, of their whole size.
            block = Some(size.unwrap_or(rows_and_last(semantic, first).1));
            known.push((first, v0));
            known.push((second, stored(&mut registers, "v1", product)));
            rest = after;
        } else {
            known.push((product, v0));
        }
        for Instr(op, arguments, made) in rest {
            let (Op::Pointwise(exprs), &[result]) = (op, &made[..]) else { return None };
            let (_, columns) = rows_and_last(semantic, result);
            let values = arguments.iter().map(|&slot| {
                if let Some((_, register)) = known.iter().find(|(known, _)| *known == slot) {
                    return Some(register.clone());
                }
                let index = operand_index(semantic, slot, result, columns)?;
                let wanted = (slot, index);
                let at = operands.iter().position(|known| *known == wanted).unwrap_or_else(|| {
                    operands.push(wanted);
                    operands.len() - 1
                });
                matches!(slot, Slot::In(_)).then(|| format!("o{at}"))
            });
            let values = values.collect::<Option<Vec<_>>>()?;
            let register = registers.expression(exprs, &values);
            let register = stored(&mut registers, &register, result);
            known.push((result, register));
        }
        let (output, last) = known.last()?.clone();
        let outputs = known.iter().filter(|(slot, _)| matches!(slot, Slot::Out(_))).count();
        if !matches!(output, Slot::Out(_)) || outputs != 1 {
            return None;
        }
        let text = format!("{}    return {last};\n", registers.text);
        Some(Epilogue { output, block, operands, fast: text.clone(), text })
    }

    /// Writes the function and adds its parameters.
    pub fn declare(&self, builder: &mut Builder) {
        let (y, columns) = (builder.ty(self.output).clone(), builder.ty(self.output).1.last().copied().unwrap_or(1));
        builder.alias("Y", y.0).constant("Y_COLUMNS", columns);
        builder.constant("HALVES", if self.block.is_some() { 2 } else { 1 });
        builder.pointer("y", self.output);
        let (mut formal, mut actual) = (String::new(), String::new());
        let mut loads = String::new();
        for (i, (slot, index)) in self.operands.iter().enumerate() {
            builder.pointer(&format!("e{i}"), *slot);
            write!(formal, ", const {}* e{i}", c_type(builder.ty(*slot).0)).expect("writing to a String");
            write!(actual, ", e{i}").expect("writing to a String");
            writeln!(loads, "    float o{i} = to_f32(e{i}[{index}]);").expect("writing to a String");
        }
        builder.line(format_args!(
            "__device__ __forceinline__ float epilogue(float v0, float v1, i64 row, int column{formal}) {{\n{loads}{}}}",
            self.text
        ));
        builder.line(format_args!("#define EPILOGUE(v0, v1, row, column) epilogue(v0, v1, row, column{actual})"));
    }

    /// Whether it reads anything beside the product.
    pub fn reads(&self) -> bool {
        !self.operands.is_empty()
    }

    /// Writes, after [`Epilogue::declare`], the same for adjacent columns whose operands are loaded together and before they are
    /// used, the first column a multiple of their number, the result's columns too:
    ///
    /// ```text
    /// struct Operands<COUNT>
    /// #define OPERANDS(COUNT, row, column) a loaded Operands<COUNT>
    /// float finished(float v0, float v1, const Operands<COUNT>& operands, int c)
    /// ```
    pub fn declare_vectors(&self, builder: &mut Builder) {
        let (mut fields, mut loads, mut values) = (String::new(), String::new(), String::new());
        let (mut formal, mut actual) = (String::new(), String::new());
        for (i, (slot, index)) in self.operands.iter().enumerate() {
            let ty = c_type(builder.ty(*slot).0);
            let (count, c) = if index.ends_with("column") { ("COUNT", "c") } else { ("1", "0") };
            write!(fields, " Pack<{ty}, {count}> o{i};").expect("writing to a String");
            write!(loads, " operands.o{i} = *(const Pack<{ty}, {count}>*)(e{i} + {index});")
                .expect("writing to a String");
            write!(values, " float o{i} = to_f32(operands.o{i}.at[{c}]);").expect("writing to a String");
            write!(formal, ", const {ty}* e{i}").expect("writing to a String");
            write!(actual, ", e{i}").expect("writing to a String");
        }
        builder.line(format_args!("template <int COUNT> struct Operands {{{fields} }};"));
        builder.line(format_args!(
            "template <int COUNT> __device__ __forceinline__ Operands<COUNT> operands_at(i64 row, int column{formal}) {{\n    \
             Operands<COUNT> operands;{loads} return operands;\n}}"
        ));
        builder.line(format_args!("#define OPERANDS(COUNT, row, column) operands_at<COUNT>(row, column{actual})"));
        builder.line(format_args!(
            "template <int COUNT> __device__ __forceinline__ float finished(float v0, float v1, const Operands<COUNT>& operands, \
             int c) {{\n   {values}\n{}}}",
            self.fast
        ));
    }
}

/// Index into an operand for the element at (row, column) of a result of `columns`.
fn operand_index(semantic: &Semantic, slot: Slot, result: Slot, columns: u64) -> Option<String> {
    let (shape, whole) = (&ty(semantic, slot).1, &ty(semantic, result).1);
    let elements: u64 = shape.iter().product();
    if shape == whole {
        Some(format!("row * {columns} + column"))
    } else if elements == columns && shape.last() == Some(&columns) {
        Some("column".into())
    } else if shape.len() == whole.len()
        && shape.last() == Some(&1)
        && shape[..shape.len() - 1] == whole[..whole.len() - 1]
    {
        Some("row".into())
    } else if elements == 1 {
        Some("0".into())
    } else {
        None
    }
}
