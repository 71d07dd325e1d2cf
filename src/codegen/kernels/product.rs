//! What twins of kernels for few rows ask of a body: rows with a prologue, a product with a weight, an epilogue.

#[cfg(test)]
pub mod samples;
mod short_conv;

use self::short_conv::{Gated, ShortConv};
use super::Problem;
use super::builder::Builder;
use super::expression::Epilogue;
use super::pattern::{Body, args, dims, dtype, results};
use crate::plan::{DType, Instr, Op, Phase, Semantic, Slot};

/// A body `epilogue(product(prologue(x), weight))`, and nothing else.
#[derive(Clone, PartialEq, Debug)]
pub struct Product {
    /// What is read, before the prologue.
    pub x: Slot,
    /// The type that the rows have in the product.
    pub rows_dtype: DType,
    /// The weight, `[N, K]` or `[E, N, K]`.
    pub weight: Slot,
    /// Rows of one matrix.
    pub n: u64,
    /// Columns of one matrix.
    pub k: u64,
    /// What is done to the rows.
    pub prologue: Prologue,
    /// Which rows meet which matrix.
    pub routing: Routing,
    /// What becomes of the product.
    after: After,
}

/// What is done to rows before they are multiplied.
#[derive(Clone, PartialEq, Debug)]
pub enum Prologue {
    /// Nothing.
    Plain,
    /// An RMSNorm over whole rows.
    Norm {
        /// `[K]`.
        weight: Slot,
        /// Added to the mean of squares.
        eps: f32,
    },
    /// The gated convolution, of a bucket in which each sequence has one row.
    ShortConv(ShortConv),
}

/// What becomes of a product.
#[derive(Clone, PartialEq, Debug)]
enum After {
    /// A function of its elements, or of those of two halves.
    Elementwise(Epilogue),
    /// The gated convolution of its columns, of a bucket in which each sequence has one row.
    ShortConv(Gated),
}

/// Which rows meet which matrix.
#[derive(Clone, PartialEq, Debug)]
pub enum Routing {
    /// All rows the one matrix.
    Dense {
        /// Number of rows.
        rows: u64,
        /// The rows of x that they are.
        gather: Option<Slot>,
    },
    /// Each row its k experts, `[T, k]`.
    Pairs {
        /// Rows.
        rows: u64,
        /// Experts of each.
        k: u64,
        /// Which.
        experts: Slot,
        /// True if x has a row for each pair.
        row_a_pair: bool,
        /// Weights of a sum over a row's experts, and the type that the products have in it.
        weighted: Option<(Slot, DType)>,
    },
    /// Rows sorted by expert.
    Grouped {
        /// Rows of the result.
        pairs: u64,
        /// Experts that there are.
        experts: u64,
        /// The first row of each.
        offsets: Slot,
        /// Where the rows of x are: the pairs, and pairs to a row of x.
        gather: Option<(Slot, u64)>,
    },
}

impl Product {
    /// Takes a step's body apart; none if it is anything else.
    pub fn of(problem: &Problem) -> Option<Product> {
        let semantic = problem.semantic;
        let mut body = Body::of(semantic);
        let (gathered, taken) = gather(semantic, &mut body);
        let (prologue, staged, x) = match norm(semantic, &mut body, taken) {
            Some((prologue, made, x)) => (prologue, Some(made), gathered.map_or(x, |(x, _)| x)),
            None if gathered.is_none() && problem.phase == Phase::Decode => match before(semantic, &mut body) {
                Some((conv, made, x)) => (Prologue::ShortConv(conv), Some(made), x),
                None => (Prologue::Plain, None, Slot::In(0)),
            },
            None => (Prologue::Plain, taken, gathered.map_or(Slot::In(0), |(x, _)| x)),
        };
        let (first, rest) = body.rest.split_first()?;
        body.rest = rest;
        let &rows = first.1.first()?;
        let &weight = first.1.get(1)?;
        if staged.unwrap_or(rows) != rows || !is_input(weight) || (staged.is_none() && !is_input(rows)) {
            return None;
        }
        let x = if staged.is_some() { x } else { rows };
        let routing = match first.0 {
            Op::Matmul => Routing::Dense { rows: dims::<2>(semantic, rows)?[0], gather: gathered.map(|(_, at)| at) },
            _ if staged.is_some() => return None,
            _ => routed(semantic, first)?,
        };
        let [mut product] = results(first)?;
        let weight_shape = &super::pattern::ty(semantic, weight).1;
        let &[n, k] = weight_shape.last_chunk()?;
        let routing = match routing {
            Routing::Pairs { rows, k: chosen, experts, row_a_pair, weighted: None } => {
                let sum = body.take(|op| matches!(op, Op::WeightedSum).then_some(()));
                let weighted = match sum {
                    Some(((), instr)) => {
                        let [summed, weights, by] = args(instr)?;
                        if summed != product || by != experts || !is_input(weights) || !is_temp(product) {
                            return None;
                        }
                        if dtype(semantic, weights) != DType::F32 {
                            return None;
                        }
                        let of = dtype(semantic, product);
                        [product] = results(instr)?;
                        Some((weights, of))
                    }
                    None => None,
                };
                Routing::Pairs { rows, k: chosen, experts, row_a_pair, weighted }
            }
            routing => routing,
        };
        let convolves = problem.phase == Phase::Decode
            && matches!(routing, Routing::Dense { .. })
            && !matches!(prologue, Prologue::ShortConv(_));
        let after = match Epilogue::new(semantic, body.rest, product) {
            Some(epilogue) => After::Elementwise(epilogue),
            None if convolves => After::ShortConv(Gated::of(semantic, &mut body, product)?),
            None => return None,
        };
        let summed = matches!(routing, Routing::Pairs { weighted: Some(_), .. });
        let dtypes = [x, rows, weight].map(|slot| dtype(semantic, slot));
        let product = Product { x, rows_dtype: dtypes[1], weight, n, k, prologue, routing, after };
        if (summed && product.block().is_some()) || dtypes.contains(&DType::I32) || n == 0 || k == 0 {
            return None;
        }
        Some(product)
    }

    /// Size of the interleaved blocks, if the product is two halves.
    pub fn block(&self) -> Option<u64> {
        match &self.after {
            After::Elementwise(epilogue) => epilogue.block,
            After::ShortConv(_) => None,
        }
    }

    /// Bands of the weight's rows, one after the other, of each of which an element of the result takes one.
    pub fn bands(&self) -> u64 {
        match &self.after {
            After::Elementwise(_) => 1,
            After::ShortConv(_) => 3,
        }
    }

    /// Rows of the product, which the kernel takes as its argument: of the sum where there is one.
    pub fn rows(&self) -> u64 {
        match self.routing {
            Routing::Dense { rows, .. } | Routing::Pairs { rows, weighted: Some(_), .. } => rows,
            Routing::Pairs { rows, k, weighted: None, .. } => rows * k,
            Routing::Grouped { pairs, .. } => pairs,
        }
    }

    /// Writes types, parameters, and the macros by which the frame of `stream.cuh` stages rows and finds their matrices.
    pub fn declare(&self, builder: &mut Builder) {
        builder.constant("N", self.n).constant("K", self.k);
        let (x, weight) = (builder.ty(self.x).0, builder.ty(self.weight).0);
        builder.alias("X", x).alias("W", weight).alias("M", self.rows_dtype);
        builder.pointer("x", self.x).pointer("w", self.weight);
        self.routing.declare(builder);
        self.prologue.declare(builder);
        match &self.after {
            After::Elementwise(epilogue) => epilogue.declare(builder),
            After::ShortConv(gated) => gated.declare(builder),
        }
        builder.int("rows", self.rows());
    }
}

impl Product {
    /// What a kernel would rather read before it waits, if it is there: which rows meet which matrix, or the state of a convolution.
    pub fn early(&self) -> Vec<Slot> {
        match (&self.prologue, &self.after) {
            (Prologue::ShortConv(conv), _) | (_, After::ShortConv(Gated { conv, .. })) => conv.state(),
            _ => self.routing.inputs(),
        }
    }
}

impl Routing {
    /// What says which rows meet which matrix of several.
    fn inputs(&self) -> Vec<Slot> {
        match self {
            Routing::Dense { .. } => vec![],
            Routing::Pairs { experts, weighted, .. } => {
                [*experts].into_iter().chain(weighted.map(|(weights, _)| weights)).collect()
            }
            Routing::Grouped { offsets, .. } => vec![*offsets],
        }
    }

    fn declare(&self, builder: &mut Builder) {
        let (mut x_row, mut used) = (String::from("(r)"), String::from("rows"));
        let list = match self {
            Routing::Dense { gather, .. } => {
                if let Some(gather) = gather {
                    builder.pointer("gather", *gather);
                    x_row = "load_fresh(gather + (r))".into();
                }
                "all_rows(groups, rows)"
            }
            Routing::Pairs { k, experts, row_a_pair, weighted, .. } => {
                builder.pointer("experts", *experts);
                if !row_a_pair {
                    x_row = format!("((r) / {k})");
                }
                match weighted {
                    Some((weights, of)) => {
                        builder.pointer("weights", *weights).alias("P", *of);
                        "each_row(groups, experts, weights, rows)"
                    }
                    None => "each_pair(groups, experts, rows)",
                }
            }
            Routing::Grouped { experts, offsets, gather, .. } => {
                builder.pointer("offsets", *offsets).constant("EXPERTS", *experts);
                if let Some((pairs, k)) = gather {
                    builder.pointer("pairs", *pairs);
                    x_row = format!("(load_fresh(pairs + (r)) / {k})");
                }
                used = "load_fresh(offsets + EXPERTS)".into();
                "by_expert(groups, offsets, EXPERTS)"
            }
        };
        if !matches!(self, Routing::Pairs { weighted: Some(_), .. }) {
            builder.alias("P", DType::F32);
        }
        builder.line(format_args!("#define X_ROW(r) {x_row}"));
        builder.line(format_args!("#define LIST {list}"));
        builder.line(format_args!("#define ROWS_USED {used}"));
    }
}

impl Prologue {
    fn declare(&self, builder: &mut Builder) {
        let (constants, stage) = match self {
            Prologue::Plain => (String::new(), "stage_plain<Multiply>(to, x, first, count, k0, row)".into()),
            Prologue::Norm { weight, eps } => {
                builder.pointer("norm", *weight).number("EPS", *eps);
                let stage = "stage_norm<Multiply, M>(to, x, first, count, k0, row, norm, EPS)".into();
                ("prefetch(norm, K)".into(), stage)
            }
            Prologue::ShortConv(conv) => conv.declare_before(builder),
        };
        builder.line(format_args!("#define CONSTANTS {constants}"));
        builder.line(format_args!("#define STAGE {stage}"));
    }
}

fn is_input(slot: Slot) -> bool {
    matches!(slot, Slot::In(_))
}

fn is_temp(slot: Slot) -> bool {
    matches!(slot, Slot::Temp(_))
}

/// A selection of rows: x and the rows, and what it makes.
fn gather(semantic: &Semantic, body: &mut Body) -> (Option<(Slot, Slot)>, Option<Slot>) {
    let before = body.rest;
    let found = body.take(|op| matches!(op, Op::GatherRows).then_some(())).and_then(|((), instr)| {
        let ([x, rows], [made]) = (args(instr)?, results(instr)?);
        let fits = is_input(x) && is_input(rows) && is_temp(made) && dtype(semantic, x) == dtype(semantic, made);
        fits.then_some(((x, rows), made))
    });
    match found {
        Some((from, made)) => (Some(from), Some(made)),
        None => {
            body.rest = before;
            (None, None)
        }
    }
}

/// An RMSNorm over whole rows, of `taken` if that is given: the norm, what it makes, and what it takes.
fn norm(semantic: &Semantic, body: &mut Body, taken: Option<Slot>) -> Option<(Prologue, Slot, Slot)> {
    let before = body.rest;
    let found =
        body.take(|op| if let Op::RmsNorm { eps } = op { Some(*eps) } else { None }).and_then(|(eps, instr)| {
            let ([x, weight], [made]) = (args(instr)?, results(instr)?);
            let ([_, width], [size]) = (dims(semantic, x)?, dims(semantic, weight)?);
            let fits =
                taken.map_or(is_input(x), |taken| taken == x) && is_input(weight) && is_temp(made) && width == size;
            fits.then_some((Prologue::Norm { weight, eps: eps as f32 }, made, x))
        });
    if found.is_none() {
        body.rest = before;
    }
    found
}

/// The gated convolution of an input: what it is, what it makes, and what it takes.
fn before(semantic: &Semantic, body: &mut Body) -> Option<(ShortConv, Slot, Slot)> {
    let rest = body.rest;
    let found = ShortConv::take(semantic, body).filter(|(_, made, x)| is_temp(*made) && is_input(*x));
    if found.is_none() {
        body.rest = rest;
    }
    found
}

/// A product with experts.
fn routed(semantic: &Semantic, instr: &Instr) -> Option<Routing> {
    match &instr.0 {
        Op::ExpertMatmul => {
            let [x, _, experts] = args(instr)?;
            let [rows, k] = dims(semantic, experts)?;
            let row_a_pair = dims::<3>(semantic, x).is_some();
            is_input(experts).then_some(Routing::Pairs { rows, k, experts, row_a_pair, weighted: None })
        }
        Op::GroupedMatmulGather { k } => {
            let [_, weight, pairs, offsets] = args(instr)?;
            let ([experts, _, _], [count]) = (dims(semantic, weight)?, dims(semantic, pairs)?);
            let gather = Some((pairs, *k));
            (is_input(pairs) && is_input(offsets)).then_some(Routing::Grouped {
                pairs: count,
                experts,
                offsets,
                gather,
            })
        }
        Op::GroupedMatmul => {
            let [x, weight, offsets] = args(instr)?;
            let ([pairs, _], [experts, _, _]) = (dims(semantic, x)?, dims(semantic, weight)?);
            is_input(offsets).then_some(Routing::Grouped { pairs, experts, offsets, gather: None })
        }
        _ => None,
    }
}
