//! Bodies as the passes make them, for tests of twins.

use std::path::Path;

use crate::codegen::kernels::{Candidate, Problem, Specialised, Twin};
use crate::plan::{Arg, BinaryFn, DType, Expr, Instr, Op, Param, Phase, Semantic, Slot, TensorType, UnaryFn};

/// A step of a bucket.
pub struct Sample {
    /// What it is.
    pub name: String,
    /// What it computes.
    pub semantic: Semantic,
    /// Of which bucket.
    pub phase: Phase,
}

/// Collects a body; the last value made is the output.
struct Maker {
    name: String,
    inputs: Vec<TensorType>,
    temps: Vec<TensorType>,
    body: Vec<Instr>,
}

impl Maker {
    fn new(name: impl Into<String>) -> Self {
        Maker { name: name.into(), inputs: vec![], temps: vec![], body: vec![] }
    }

    fn input(&mut self, dtype: DType, shape: &[u64]) -> Slot {
        self.inputs.push(TensorType(dtype, shape.to_vec()));
        Slot::In(self.inputs.len() as u32 - 1)
    }

    fn op(&mut self, op: Op, args: &[Slot], dtype: DType, shape: &[u64]) -> Slot {
        self.temps.push(TensorType(dtype, shape.to_vec()));
        let made = Slot::Temp(self.temps.len() as u32 - 1);
        self.body.push(Instr(op, args.to_vec(), vec![made]));
        made
    }

    fn split(&mut self, block: Option<u64>, x: Slot, dtype: DType, shape: &[u64], parts: usize) -> Vec<Slot> {
        let first = self.temps.len() as u32;
        self.temps.extend(vec![TensorType(dtype, shape.to_vec()); parts]);
        let made: Vec<Slot> = (first..first + parts as u32).map(Slot::Temp).collect();
        self.body.push(Instr(Op::Split { block }, vec![x], made.clone()));
        made
    }

    fn binary(&mut self, function: BinaryFn, x: Slot, y: Slot, dtype: DType, shape: &[u64]) -> Slot {
        let exprs = vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(function, 0, 1)];
        self.op(Op::Pointwise(exprs), &[x, y], dtype, shape)
    }

    fn swiglu(&mut self, product: Slot, dtype: DType, shape: &[u64]) -> Slot {
        let halves = self.split(Some(8), product, dtype, shape, 2);
        let silu = vec![Expr::Arg(0), Expr::Unary(UnaryFn::Silu, 0)];
        let silu = self.op(Op::Pointwise(silu), &[halves[0]], dtype, shape);
        self.binary(BinaryFn::Mul, silu, halves[1], dtype, shape)
    }

    /// The gated convolution of rows of three parts.
    fn gates(&mut self, whole: Slot, state: [Slot; 4], bias: Option<Slot>, dtype: DType, shape: &[u64]) -> Slot {
        let parts = self.split(None, whole, dtype, shape, 3);
        let u = self.binary(BinaryFn::Mul, parts[0], parts[2], dtype, shape);
        let [taps, ring, pos, slot] = state;
        let mut y = self.op(Op::Conv1dCausal, &[u, taps, ring, pos, slot], dtype, shape);
        if let Some(bias) = bias {
            y = self.binary(BinaryFn::Add, y, bias, dtype, shape);
        }
        self.binary(BinaryFn::Mul, parts[1], y, dtype, shape)
    }

    fn finish(mut self) -> Sample {
        let last = Slot::Temp(self.temps.len() as u32 - 1);
        let outputs = vec![self.temps.pop().expect("a body makes something")];
        for slot in self.body.iter_mut().flat_map(|Instr(_, args, made)| args.iter_mut().chain(made)) {
            if *slot == last {
                *slot = Slot::Out(0);
            }
        }
        let Maker { name, inputs, temps, body } = self;
        let semantic = Semantic { name: name.clone(), inputs, outputs, temps, body };
        Sample { name, semantic, phase: Phase::Decode }
    }
}

/// `matmul`.
pub fn matmul(x: DType, w: DType, rows: u64, n: u64, k: u64) -> Sample {
    let mut maker = Maker::new(format!("matmul_{rows}_{n}_{k}"));
    let args = [maker.input(x, &[rows, k]), maker.input(w, &[n, k])];
    maker.op(Op::Matmul, &args, x, &[rows, n]);
    maker.finish()
}

/// `matmul+residual`.
pub fn residual(x: DType, w: DType, rows: u64, n: u64, k: u64) -> Sample {
    let mut maker = Maker::new(format!("residual_{rows}_{n}_{k}"));
    let args = [maker.input(x, &[rows, k]), maker.input(w, &[n, k])];
    let stream = maker.input(x, &[rows, n]);
    let product = maker.op(Op::Matmul, &args, x, &[rows, n]);
    maker.binary(BinaryFn::Add, stream, product, x, &[rows, n]);
    maker.finish()
}

/// `norm+matmul`.
pub fn norm(x: DType, w: DType, rows: u64, n: u64, k: u64) -> Sample {
    norm_of(x, w, rows, n, k, k)
}

fn norm_of(x: DType, w: DType, rows: u64, n: u64, k: u64, group: u64) -> Sample {
    let mut maker = Maker::new(format!("norm_{rows}_{n}_{k}"));
    let args = [maker.input(x, &[rows, k]), maker.input(w, &[group])];
    let weight = maker.input(w, &[n, k]);
    let normed = maker.op(Op::RmsNorm { eps: 1e-5 }, &args, x, &[rows, k]);
    maker.op(Op::Matmul, &[normed, weight], x, &[rows, n]);
    maker.finish()
}

/// `norm+matmul+swiglu`.
pub fn swiglu(x: DType, w: DType, rows: u64, n: u64, k: u64) -> Sample {
    let mut maker = Maker::new(format!("swiglu_{rows}_{n}_{k}"));
    let args = [maker.input(x, &[rows, k]), maker.input(w, &[k])];
    let weight = maker.input(w, &[n, k]);
    let normed = maker.op(Op::RmsNorm { eps: 1e-5 }, &args, x, &[rows, k]);
    let product = maker.op(Op::Matmul, &[normed, weight], x, &[rows, n]);
    maker.swiglu(product, x, &[rows, n / 2]);
    maker.finish()
}

/// `gather+norm+matmul`, the logits.
pub fn head(x: DType, w: DType, rows: u64, n: u64, k: u64) -> Sample {
    let mut maker = Maker::new(format!("head_{rows}_{n}_{k}"));
    let args = [maker.input(x, &[rows, k]), maker.input(DType::I32, &[rows])];
    let (gain, weight) = (maker.input(w, &[k]), maker.input(w, &[n, k]));
    let hidden = maker.op(Op::GatherRows, &args, x, &[rows, k]);
    let normed = maker.op(Op::RmsNorm { eps: 1e-5 }, &[hidden, gain], x, &[rows, k]);
    maker.op(Op::Matmul, &[normed, weight], DType::F32, &[rows, n]);
    maker.finish()
}

/// `shortconv+matmul+residual`, of k channels.
pub fn short_conv(x: DType, w: DType, rows: u64, k: u64, bias: bool) -> Sample {
    let mut maker = Maker::new(format!("shortconv_{rows}_{k}_{bias}"));
    let whole = maker.input(x, &[rows, 3 * k]);
    let (taps, ring) = (maker.input(w, &[k, 3]), maker.input(x, &[64, 8, k]));
    let (pos, slot) = (maker.input(DType::I32, &[rows]), maker.input(DType::I32, &[rows]));
    let (weight, stream) = (maker.input(w, &[k, k]), maker.input(x, &[rows, k]));
    let bias = bias.then(|| maker.input(w, &[k]));
    let gated = maker.gates(whole, [taps, ring, pos, slot], bias, x, &[rows, k]);
    let product = maker.op(Op::Matmul, &[gated, weight], x, &[rows, k]);
    maker.binary(BinaryFn::Add, stream, product, x, &[rows, k]);
    maker.finish()
}

/// `norm+matmul+shortconv`, of so many channels and taps, or without the norm and with biases.
pub fn gated(x: DType, w: DType, rows: u64, [channels, taps]: [u64; 2], k: u64, biases: bool) -> Sample {
    let mut maker = Maker::new(format!("gated_{rows}_{channels}_{taps}_{k}_{biases}"));
    let from = maker.input(x, &[rows, k]);
    let weight = maker.input(w, &[3 * channels, k]);
    let (taps, ring) = (maker.input(w, &[channels, taps]), maker.input(x, &[64, 8, channels]));
    let (pos, slot) = (maker.input(DType::I32, &[rows]), maker.input(DType::I32, &[rows]));
    let mut product = from;
    if !biases {
        let norm = maker.input(w, &[k]);
        product = maker.op(Op::RmsNorm { eps: 1e-5 }, &[from, norm], x, &[rows, k]);
    }
    product = maker.op(Op::Matmul, &[product, weight], x, &[rows, 3 * channels]);
    let mut bias = None;
    if biases {
        let shift = maker.input(w, &[3 * channels]);
        product = maker.binary(BinaryFn::Add, product, shift, x, &[rows, 3 * channels]);
        bias = Some(maker.input(w, &[channels]));
    }
    maker.gates(product, [taps, ring, pos, slot], bias, x, &[rows, channels]);
    maker.finish()
}

/// `expert+swiglu`, each row by itself.
pub fn pairs(x: DType, w: DType, rows: u64, [experts, k]: [u64; 2], n: u64, width: u64) -> Sample {
    let mut maker = Maker::new(format!("pairs_{rows}_{n}_{width}"));
    let (from, weight) = (maker.input(x, &[rows, width]), maker.input(w, &[experts, n, width]));
    let chosen = maker.input(DType::I32, &[rows, k]);
    let product = maker.op(Op::ExpertMatmul, &[from, weight, chosen], x, &[rows, k, n]);
    maker.swiglu(product, x, &[rows, k, n / 2]);
    maker.finish()
}

/// `expert+combine+residual`.
pub fn combine(x: DType, w: DType, rows: u64, [experts, k]: [u64; 2], n: u64, width: u64) -> Sample {
    let mut maker = Maker::new(format!("combine_{rows}_{n}_{width}"));
    let (from, weight) = (maker.input(x, &[rows, k, width]), maker.input(w, &[experts, n, width]));
    let (chosen, weights) = (maker.input(DType::I32, &[rows, k]), maker.input(DType::F32, &[rows, k]));
    let stream = maker.input(x, &[rows, n]);
    let product = maker.op(Op::ExpertMatmul, &[from, weight, chosen], x, &[rows, k, n]);
    let sum = maker.op(Op::WeightedSum, &[product, weights, chosen], x, &[rows, n]);
    maker.binary(BinaryFn::Add, stream, sum, x, &[rows, n]);
    maker.finish()
}

/// `expert+swiglu` of sorted rows.
pub fn grouped_gather(x: DType, w: DType, rows: u64, [experts, k]: [u64; 2], n: u64, width: u64) -> Sample {
    let mut maker = Maker::new(format!("gather_{rows}_{n}_{width}"));
    let (from, weight) = (maker.input(x, &[rows, width]), maker.input(w, &[experts, n, width]));
    let (pairs, offsets) = (maker.input(DType::I32, &[rows * k]), maker.input(DType::I32, &[experts + 1]));
    let product = maker.op(Op::GroupedMatmulGather { k }, &[from, weight, pairs, offsets], x, &[rows * k, n]);
    maker.swiglu(product, x, &[rows * k, n / 2]);
    maker.finish()
}

/// The product of sorted rows.
pub fn grouped(x: DType, w: DType, pairs: u64, experts: u64, n: u64, width: u64) -> Sample {
    let mut maker = Maker::new(format!("grouped_{pairs}_{n}_{width}"));
    let (from, weight) = (maker.input(x, &[pairs, width]), maker.input(w, &[experts, n, width]));
    let offsets = maker.input(DType::I32, &[experts + 1]);
    maker.op(Op::GroupedMatmul, &[from, weight, offsets], x, &[pairs, n]);
    maker.finish()
}

/// Every body, of LFM2-8B-A1B and of small sizes.
pub fn all(x: DType, w: DType) -> Vec<Sample> {
    let mut found = vec![];
    for rows in [1, 8] {
        found.extend([
            matmul(x, w, rows, 2048, 2048),
            residual(x, w, rows, 2048, 7168),
            norm(x, w, rows, 6144, 2048),
            swiglu(x, w, rows, 14336, 2048),
            head(x, w, rows, 65536, 2048),
            short_conv(x, w, rows, 2048, rows == 8),
            short_conv(x, w, rows, 128, false),
            pairs(x, w, rows, [32, 4], 3584, 2048),
            combine(x, w, rows, [32, 4], 2048, 1792),
            pairs(x, w, rows, [8, 2], 192, 128),
            combine(x, w, rows, [8, 2], 128, 96),
            grouped_gather(x, w, rows, [32, 4], 3584, 2048),
            grouped(x, w, rows * 4, 32, 2048, 1792),
            norm(x, w, rows, 48, 40),
        ]);
    }
    found.extend([
        residual(x, w, 64, 2048, 2048),
        residual(x, w, 64, 2048, 7168),
        norm(x, w, 64, 6144, 2048),
        norm(x, w, 16, 3072, 2048),
        swiglu(x, w, 32, 14336, 2048),
        short_conv(x, w, 64, 2048, false),
        head(x, w, 64, 65536, 2048),
        grouped_gather(x, w, 64, [32, 4], 3584, 2048),
        grouped(x, w, 256, 32, 2048, 1792),
    ]);
    found
}

/// Every body in small sizes, some of them odd.
pub fn small(x: DType, w: DType) -> Vec<Sample> {
    let mut found = vec![];
    for rows in [1, 3, 8, 13, 64] {
        found.extend([
            matmul(x, w, rows, 48, 40),
            residual(x, w, rows, 128, 1096),
            norm(x, w, rows, 192, 520),
            swiglu(x, w, rows, 128, 264),
            head(x, w, rows, 4352, 64),
            short_conv(x, w, rows, 128, rows % 2 == 1),
            pairs(x, w, rows, [8, 2], 192, 136),
            combine(x, w, rows, [8, 2], 128, 96),
            grouped_gather(x, w, rows, [8, 2], 192, 128),
            grouped(x, w, rows * 2, 8, 128, 520),
        ]);
    }
    found
}

/// Bodies that end with a convolution, of LFM2-8B-A1B and of small sizes.
pub fn convolved(x: DType, w: DType) -> Vec<Sample> {
    let of = |rows, sizes, k| [false, true].map(|biases| gated(x, w, rows, sizes, k, biases));
    let sizes = [
        of(1, [2048, 3], 2048),
        of(8, [2048, 3], 2048),
        of(16, [2048, 3], 2048),
        of(1, [128, 3], 264),
        of(3, [64, 4], 128),
        of(8, [40, 1], 520),
        of(13, [128, 8], 1096),
        of(1, [4096, 3], 64),
    ];
    sizes.into_iter().flatten().collect()
}

/// Bodies of which one thing is wrong.
pub fn broken(dtype: DType) -> Vec<Sample> {
    let change = |mut sample: Sample, name: &str, change: fn(&mut Vec<Instr>)| {
        change(&mut sample.semantic.body);
        sample.name = name.into();
        sample
    };
    let conv = || short_conv(dtype, dtype, 2, 64, false);
    let behind = || gated(dtype, dtype, 2, [64, 3], 64, false);
    vec![
        change(norm(dtype, dtype, 2, 64, 64), "the product takes x, not the norm", |body| body[1].1[0] = Slot::In(0)),
        change(conv(), "b * c", |body| body[1].1[1] = Slot::Temp(1)),
        change(conv(), "the convolution takes b", |body| body[2].1[0] = Slot::Temp(0)),
        change(conv(), "u is added", |body| body[5].1[0] = Slot::Temp(3)),
        change(behind(), "a convolution of the norm", |body| body[2].1[0] = Slot::Temp(0)),
        change(behind(), "c * x", |body| body[3].1[0] = Slot::Temp(3)),
        change(behind(), "the convolution's input is gated", |body| body[5].1[1] = Slot::Temp(5)),
        change(behind(), "b gates", |body| body[5].1[0] = Slot::Temp(2)),
        change(behind(), "the split is interleaved behind", |body| body[2].0 = Op::Split { block: Some(8) }),
        change(conv(), "the split is interleaved", |body| body[0].0 = Op::Split { block: Some(8) }),
        change(combine(dtype, dtype, 2, [8, 2], 64, 64), "a sum by other experts", |body| body[1].1[2] = Slot::In(1)),
        change(combine(dtype, dtype, 2, [8, 2], 64, 64), "no sum", |body| {
            body.remove(1);
        }),
        change(residual(dtype, dtype, 2, 64, 64), "a norm at the end", |body| body[1].0 = Op::RmsNorm { eps: 1e-5 }),
        norm_of(dtype, dtype, 2, 64, 64, 32),
    ]
}

/// Writes the text of every candidate of every body, a file each, which begins with the launch and its arguments.
pub fn write(twins: &[&'static dyn Twin], folder: &Path) {
    use DType::{BF16, F16, F32};
    for (x, w) in [(BF16, BF16), (F16, F16), (F32, BF16), (F32, F32), (F32, F16), (F16, BF16)] {
        for sample in all(x, w).into_iter().chain(small(x, w)).chain(convolved(x, w)) {
            let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
            for twin in twins {
                for (i, specialised) in twin.candidates(&problem).into_iter().enumerate() {
                    let candidate = Candidate { twin: *twin, specialised };
                    let file = format!("{}-{x:?}-{w:?}-{i}-{}.cu", sample.name, twin.name());
                    let text = format!("{}{}", opening(&sample, &candidate), candidate.text());
                    std::fs::write(folder.join(file), text).expect("writing a text");
                }
            }
        }
    }
}

fn opening(sample: &Sample, candidate: &Candidate) -> String {
    let Specialised { launch, params, .. } = &candidate.specialised;
    let launched = format!("{} {} {} {}", launch.grid[0], launch.block, launch.cluster, launch.shared);
    let mut head = format!("// {}: {}\n// launch {launched}\n", sample.name, candidate.name());
    for (Param(name, _), arg) in params.iter().zip(&launch.args) {
        let ty = match *arg {
            Arg::Read(i) => &sample.semantic.inputs[i as usize],
            Arg::Write(i) => &sample.semantic.outputs[i as usize],
            _ => {
                head += &format!("// arg {name} {arg:?}\n");
                continue;
            }
        };
        let shape: Vec<String> = ty.1.iter().map(u64::to_string).collect();
        head += &format!("// arg {name} {arg:?} {:?} {}\n", ty.0, shape.join(","));
    }
    head
}
