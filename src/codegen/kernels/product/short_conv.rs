//! The gated convolution beside a product: of the rows that are multiplied, or of the columns that the product makes.

use super::{is_input, is_temp};
use crate::codegen::kernels::builder::{Builder, c_type};
use crate::codegen::kernels::pattern::{Body, args, dims, dtype, results};
use crate::plan::{BinaryFn, DType, Expr, Op, Semantic, Slot};

/// Most taps of a convolution.
const MOST_TAPS: u64 = 8;

/// `c * (conv(b * x) + bias)` of rows `[b, c, x]`.
#[derive(Clone, PartialEq, Debug)]
pub struct ShortConv {
    weight: Slot,
    ring: Slot,
    pos: Slot,
    slot: Slot,
    bias: Option<Slot>,
    /// Types of b * x, the convolution, and that with its bias.
    types: [DType; 3],
    taps: u64,
    columns: u64,
    channels: u64,
}

/// The gated convolution of a product's columns.
#[derive(Clone, PartialEq, Debug)]
pub struct Gated {
    /// The convolution.
    pub conv: ShortConv,
    /// The type of the product.
    product: DType,
    /// A bias of the product, and the type of their sum.
    bias: Option<(Slot, DType)>,
    /// The output.
    y: Slot,
}

impl ShortConv {
    /// Takes the operators of a gated convolution: what it is, what it makes, and what it takes.
    pub fn take(semantic: &Semantic, body: &mut Body) -> Option<(ShortConv, Slot, Slot)> {
        let ((), split) = body.take(|op| matches!(op, Op::Split { block: None }).then_some(()))?;
        let ([from], [b, c, x]) = (args(split)?, results(split)?);
        let u = other(body, BinaryFn::Mul, b).filter(|(other, _)| *other == x)?.1;
        let ((), conv) = body.take(|op| matches!(op, Op::Conv1dCausal).then_some(()))?;
        let ([taken, weight, ring, pos, slot], [made]) = (args(conv)?, results(conv)?);
        let (bias, last) = biased(semantic, body, made);
        let gated = other(body, BinaryFn::Mul, last).filter(|(other, _)| *other == c)?.1;
        let ([_, width], [channels, taps], [_, columns, _]) =
            (dims::<2>(semantic, from)?, dims::<2>(semantic, weight)?, dims::<3>(semantic, ring)?);
        let inputs = [weight, ring, pos, slot].into_iter().all(is_input);
        let temps = [b, c, x, u, made, last].into_iter().all(is_temp);
        let part = |slot| dims::<2>(semantic, slot).is_some_and(|[_, size]| size == channels);
        let sizes = [b, c, x].into_iter().all(part) && width == 3 * channels && taps <= MOST_TAPS.min(columns);
        if !(inputs && temps && sizes && taken == u) {
            return None;
        }
        let types = [u, made, last].map(|slot| dtype(semantic, slot));
        Some((ShortConv { weight, ring, pos, slot, bias, types, taps, columns, channels }, gated, from))
    }

    /// What says which columns of the past there are, and holds them.
    pub fn state(&self) -> Vec<Slot> {
        vec![self.ring, self.pos, self.slot]
    }

    fn declare(&self, builder: &mut Builder) -> (String, String) {
        builder.pointer("conv", self.weight).state("ring", self.ring);
        builder.pointer("pos", self.pos).pointer("slot", self.slot);
        (self.types.map(c_type).join(", "), pointer_or_none(builder, "bias", self.bias))
    }

    /// Adds the parameters of a convolution before the product. What a kernel begins with, and how it stages rows.
    pub fn declare_before(&self, builder: &mut Builder) -> (String, String) {
        let ((types, bias), taps, columns) = (self.declare(builder), self.taps, self.columns);
        let stage = format!(
            "stage_short_conv<Multiply, M, {types}, {taps}, {columns}>(to, x, first, count, k0, conv, ring, pos, slot, {bias}, \
             writes, early)"
        );
        let ahead = format!("if (early) look_ahead<{taps}, {columns}>(ring, pos, slot, rows)");
        (format!("prefetch(conv, K * {taps}); {ahead}"), stage)
    }
}

impl Gated {
    /// The rest of a body, if it is the gated convolution of a product.
    pub fn of(semantic: &Semantic, body: &mut Body, product: Slot) -> Option<Gated> {
        let (bias, columns) = biased(semantic, body, product);
        let (conv, y, from) = ShortConv::take(semantic, body)?;
        let wired = from == columns && is_temp(product) && is_temp(columns) && matches!(y, Slot::Out(_));
        let floats = [product, columns, y, conv.ring].iter().all(|&slot| dtype(semantic, slot) != DType::I32);
        let bias = bias.map(|bias| (bias, dtype(semantic, columns)));
        let product = dtype(semantic, product);
        (wired && floats && body.rest.is_empty()).then_some(Gated { conv, product, bias, y })
    }

    /// Writes what `kernels/ring.cu` says of a convolution after the product, and adds its parameters.
    pub fn declare(&self, builder: &mut Builder) {
        let ShortConv { taps, columns, channels, .. } = self.conv;
        let y = builder.ty(self.y).0;
        builder.alias("Y", y).constant("Y_COLUMNS", channels).constant("HALVES", 1);
        builder.pointer("y", self.y);
        let (types, bias) = self.conv.declare(builder);
        let projected = pointer_or_none(builder, "shift", self.bias.map(|(bias, _)| bias));
        let product = [self.product, self.bias.map_or(self.product, |(_, dtype)| dtype)].map(c_type).join(", ");
        builder.line(format_args!(
            "#define CONVOLUTION convolution<{product}, {types}, {taps}, {columns}, {channels}>(conv, ring, {bias}, {projected})"
        ));
    }
}

/// The parameter of an input, or what stands for none.
fn pointer_or_none(builder: &mut Builder, name: &'static str, slot: Option<Slot>) -> String {
    match slot {
        Some(slot) => {
            builder.pointer(name, slot);
            name.into()
        }
        None => "(const float*)nullptr".into(),
    }
}

/// Takes the addition of a bias to the columns of x, if that is next: the bias, and what x is then.
fn biased(semantic: &Semantic, body: &mut Body, x: Slot) -> (Option<Slot>, Slot) {
    let before = body.rest;
    if let Some((bias, sum)) = other(body, BinaryFn::Add, x)
        && dims::<1>(semantic, bias) == dims::<2>(semantic, x).map(|[_, channels]| [channels])
        && is_input(bias)
    {
        return (Some(bias), sum);
    }
    body.rest = before;
    (None, x)
}

/// Takes `function(x, y)` or `function(y, x)`, and gives y and the result.
fn other(body: &mut Body, function: BinaryFn, x: Slot) -> Option<(Slot, Slot)> {
    let whole = |op: &Op| match op {
        Op::Pointwise(exprs) => match exprs[..] {
            [Expr::Arg(a), Expr::Arg(b), Expr::Binary(found, 0, 1)] if found == function && a + b == 1 => Some(()),
            _ => None,
        },
        _ => None,
    };
    let ((), instr) = body.take(whole)?;
    let ([a, b], [made]) = (args(instr)?, results(instr)?);
    if a == x {
        Some((b, made))
    } else if b == x {
        Some((a, made))
    } else {
        None
    }
}
