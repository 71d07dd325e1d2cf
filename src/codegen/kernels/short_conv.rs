//! `kernels/short_conv.cu`: the causal convolution with its ring, alone or between its two gates.

use super::builder::{Builder, Specialised};
use super::hopper::PROCESSORS;
use super::pattern::{Body, args, dims, dtype, results, ty};
use super::{Problem, Twin};
use crate::plan::{BinaryFn, DType, Expr, Instr, Op, Phase, Semantic, Slot};

/// The twin.
pub struct ShortConv;

const THREADS: u64 = 128;
/// Rows of a strip, by the kernel.
const MOST_ROWS: u64 = 32;
/// Taps that fit the kernel's description of a row.
const MOST_TAPS: u64 = 28;
/// Weights and columns that a thread keeps in registers, about.
const MOST_KEPT: u64 = 64;
/// Threads that the device works on at once, by the registers that eight channels take.
const AT_ONCE: u64 = PROCESSORS * 640;

impl Twin for ShortConv {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn source(&self) -> &'static str {
        include_str!("../../../kernels/short_conv.cu")
    }

    fn candidates(&self, problem: &Problem) -> Vec<Specialised> {
        let Some(conv) = Conv::of(problem.semantic) else { return vec![] };
        [8, 4, 2, 1].into_iter().filter_map(|vector| conv.specialise(problem, vector)).collect()
    }
}

struct Conv {
    /// What rows of the kernel's x are: the convolution's input, or three parts.
    x: Slot,
    gates: Option<Gates>,
    /// The convolution's input, as it is stored.
    u: Slot,
    weight: Slot,
    ring: Slot,
    pos: Slot,
    slot: Slot,
    /// The convolution's result.
    convolved: Slot,
    /// A bias, and the result of adding it.
    bias: Option<(Slot, Slot)>,
    y: Slot,
}

/// Which parts of a row the two factors of the input and the factor of the result are.
struct Gates {
    first: u64,
    second: u64,
    gate: u64,
}

impl Conv {
    fn of(semantic: &Semantic) -> Option<Conv> {
        let mut body = Body::of(semantic);
        let split = body.take(|op| matches!(op, Op::Split { block: None }).then_some(()));
        let gated = match split {
            Some((_, split)) => {
                let ([x], [_, _, _]) = (args(split)?, results::<3>(split)?);
                Some((x, &split.2, body.take(|op| matches!(op, Op::Pointwise(_)).then_some(()))?.1))
            }
            None => None,
        };
        let (_, conv) = body.take(|op| matches!(op, Op::Conv1dCausal).then_some(()))?;
        let ([u, weight, ring, pos, slot], [convolved]) = (args(conv)?, results(conv)?);
        let mut found = Conv { x: u, gates: None, u, weight, ring, pos, slot, convolved, bias: None, y: convolved };
        if let Some((x, parts, mul)) = gated {
            let ([a, b], made) = combined(mul, BinaryFn::Mul)?;
            let mut last = body.take(|op| matches!(op, Op::Pointwise(_)).then_some(()))?.1;
            if let Some((sides, biased)) = combined(last, BinaryFn::Add) {
                let bias = other(sides, convolved)?;
                found.bias = Some((bias, biased));
                last = body.take(|op| matches!(op, Op::Pointwise(_)).then_some(()))?.1;
            }
            let (sides, y) = combined(last, BinaryFn::Mul)?;
            let gate = other(sides, found.bias.map_or(convolved, |(_, biased)| biased))?;
            let part = |slot: Slot| parts.iter().position(|&part| part == slot).map(|at| at as u64);
            let gates = Gates { first: part(a)?, second: part(b)?, gate: part(gate)? };
            // Each part has one use.
            if made != u || gates.first + gates.second + gates.gate != 3 || gates.first == gates.second {
                return None;
            }
            let inside = parts.iter().chain([&u, &convolved]).chain(found.bias.as_ref().map(|(_, biased)| biased));
            let like_x = |part: &Slot| {
                dtype(semantic, *part) == dtype(semantic, x) && ty(semantic, *part).1 == ty(semantic, u).1
            };
            if !inside.copied().all(|slot| matches!(slot, Slot::Temp(_))) || !parts.iter().all(like_x) {
                return None;
            }
            found = Conv { x, gates: Some(gates), y, ..found };
        }
        (body.rest.is_empty() && found.fits(semantic)?).then_some(found)
    }

    /// Whether types and shapes are as the kernel takes them.
    fn fits(&self, semantic: &Semantic) -> Option<bool> {
        let ([rows, channels], [_, taps]) = (dims(semantic, self.y)?, dims(semantic, self.weight)?);
        let [_, columns, ring_channels] = dims(semantic, self.ring)?;
        let width = if self.gates.is_some() { 3 * channels } else { channels };
        let bias = self.bias.map(|(bias, _)| bias);
        let inputs = [self.x, self.weight, self.ring, self.pos, self.slot].into_iter().chain(bias);
        let floats = [self.x, self.u, self.weight, self.ring, self.convolved, self.y].into_iter().chain(bias);
        let shapes = dims(semantic, self.x) == Some([rows, width])
            && dims(semantic, self.u) == Some([rows, channels])
            && dims(semantic, self.weight) == Some([channels, taps])
            && bias.is_none_or(|bias| dims(semantic, bias) == Some([channels]))
            && [self.pos, self.slot].iter().all(|&slot| dims(semantic, slot) == Some([rows]));
        Some(
            shapes
                && matches!(self.y, Slot::Out(_))
                && inputs.into_iter().all(|slot| matches!(slot, Slot::In(_)))
                && floats.into_iter().all(|slot| dtype(semantic, slot) != DType::I32)
                && [self.pos, self.slot].iter().all(|&slot| dtype(semantic, slot) == DType::I32)
                && ring_channels == channels
                && (1..=columns.min(MOST_TAPS)).contains(&taps)
                && width.max(rows) <= i32::MAX as u64
                && columns <= i32::MAX as u64,
        )
    }

    fn specialise(&self, problem: &Problem, vector: u64) -> Option<Specialised> {
        let semantic = problem.semantic;
        let ([rows, channels], [_, taps]) = (dims(semantic, self.y)?, dims(semantic, self.weight)?);
        let [_, columns, _] = dims(semantic, self.ring)?;
        let fits = vector * dtype(semantic, self.x).bytes() <= 16 && vector * taps * 2 <= MOST_KEPT;
        if !channels.is_multiple_of(vector) || vector > 1 && !fits {
            return None;
        }
        let single = problem.phase == Phase::Decode;
        let lanes = channels / vector;
        let threads = THREADS.min(lanes.next_multiple_of(32));
        let strip = if single { 1 } else { (rows * lanes).div_ceil(AT_ONCE).clamp(1, MOST_ROWS) };
        let grid = [lanes.div_ceil(threads), rows.div_ceil(strip), 1];
        if grid[1] > 65535 {
            return None;
        }
        let mut builder = Builder::new(problem);
        let width = if self.gates.is_some() { 3 * channels } else { channels };
        builder.constant("CHANNELS", channels).constant("TAPS", taps).constant("COLUMNS", columns);
        builder.constant("VECTOR", vector).constant("X_COLUMNS", width);
        builder.line(format_args!("#define SINGLE {}", u8::from(single)));
        builder.line(format_args!("#define GATED {}", u8::from(self.gates.is_some())));
        builder.line(format_args!("#define BIASED {}", u8::from(self.bias.is_some())));
        for (name, slot) in
            [("X", self.x), ("U", self.u), ("W", self.weight), ("R", self.ring), ("V", self.convolved), ("Y", self.y)]
        {
            builder.alias(name, dtype(semantic, slot));
        }
        if let Some(Gates { first, second, gate }) = self.gates {
            builder.constant("FIRST_AT", first * channels).constant("SECOND_AT", second * channels);
            builder.constant("GATE_AT", gate * channels);
        }
        builder.pointer("y", self.y).pointer("x", self.x).pointer("weight", self.weight).state("ring", self.ring);
        builder.pointer("pos", self.pos).pointer("slot", self.slot);
        if let Some((bias, biased)) = self.bias {
            builder.alias("B", dtype(semantic, biased)).pointer("bias", bias);
        }
        if !single {
            builder.int("rows", rows).int("strip", strip);
        }
        Some(builder.finish(format!("vector={vector}"), grid, threads as u32, 0))
    }
}

/// The two different operands and the result of an instruction that only applies this function to them.
fn combined(instr: &Instr, function: BinaryFn) -> Option<([Slot; 2], Slot)> {
    let (Op::Pointwise(exprs), [a, b], [made]) = (&instr.0, args(instr)?, results(instr)?) else { return None };
    let [Expr::Arg(x), Expr::Arg(y), Expr::Binary(found, 0, 1) | Expr::Binary(found, 1, 0)] = exprs[..] else {
        return None;
    };
    (found == function && x + y == 1 && a != b).then_some(([a, b], made))
}

/// The one of two that is not `known`, which is among them.
fn other([a, b]: [Slot; 2], known: Slot) -> Option<Slot> {
    match known {
        known if known == a => Some(b),
        known if known == b => Some(a),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
