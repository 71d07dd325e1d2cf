//! Puts a specialised kernel together: generated text, parameters with their arguments, launch shape.

use std::fmt::{Display, Write};

use crate::plan::{Arg, DType, Launch, Param, ParamType, Promotion, Semantic, Slot, Swizzle, TensorMap, TensorType};

use super::Problem;
use super::hopper::PROCESSORS;

/// A kernel specialised to a step.
#[derive(Clone, PartialEq, Debug)]
pub struct Specialised {
    /// What distinguishes it from the twin's other candidates: `rows=16 warps=8`; empty if there is but one.
    pub config: String,
    /// Parameters, in order.
    pub params: Vec<Param>,
    /// Shape and arguments; the kernel's position is filled in later.
    pub launch: Launch,
    /// For each parameter, whether nothing writes what it points to while a plan runs.
    constant: Vec<bool>,
    text: String,
}

impl Specialised {
    /// The generated text that stands before the source: includes, constants, types, functions, and `PARAMS`, the list of
    /// parameters as the kernel's signature takes it.
    pub fn prelude(&self) -> String {
        let params = self.params.iter().zip(&self.constant);
        let params: Vec<String> =
            params.map(|(Param(name, ty), constant)| format!("{}{name}", c_param(*ty, *constant))).collect();
        let threads = self.launch.block;
        format!(
            "// Generated.\n#include \"types.cuh\"\n#include \"block.cuh\"\nconstexpr int THREADS = {threads};\n{}#define PARAMS {}\n",
            self.text,
            params.join(", ")
        )
    }
}

/// Collects what a [`Specialised`] needs.
pub struct Builder<'a> {
    semantic: Option<&'a Semantic>,
    text: String,
    params: Vec<Param>,
    constant: Vec<bool>,
    args: Vec<Arg>,
    cluster: u32,
    releases_late: bool,
    early: Vec<u32>,
}

impl<'a> Builder<'a> {
    /// Nothing yet.
    pub fn new(problem: &'a Problem<'a>) -> Self {
        Builder { semantic: Some(problem.semantic), ..Builder::service() }
    }

    /// Nothing yet, for a kernel that no step launches.
    pub fn service() -> Self {
        Builder {
            semantic: None,
            text: String::new(),
            params: vec![],
            constant: vec![],
            args: vec![],
            cluster: 1,
            releases_late: false,
            early: vec![],
        }
    }

    /// `constexpr int NAME = value;`
    pub fn constant(&mut self, name: &str, value: u64) -> &mut Self {
        self.line(format_args!("constexpr int {name} = {value};"))
    }

    /// `constexpr float NAME = value;`, the exact bits.
    pub fn number(&mut self, name: &str, value: f32) -> &mut Self {
        self.line(format_args!("constexpr float {name} = {};", c_number(value)))
    }

    /// `typedef float NAME;`
    pub fn alias(&mut self, name: &str, dtype: DType) -> &mut Self {
        self.line(format_args!("typedef {} {name};", c_type(dtype)))
    }

    /// A line of text.
    pub fn line(&mut self, line: impl Display) -> &mut Self {
        writeln!(self.text, "{line}").expect("writing to a String");
        self
    }

    /// A pointer to an input or output of the step. A state that the step updates is passed with [`Builder::state`].
    pub fn pointer(&mut self, name: &str, slot: Slot) -> &mut Self {
        let dtype = self.ty(slot).0;
        match slot {
            Slot::In(i) => {
                self.param(name, ParamType::In(dtype), Arg::Read(i));
                let constant = self.semantic.is_some_and(|semantic| super::pattern::is_weight(semantic, slot));
                if let Some(last) = self.constant.last_mut() {
                    *last = constant;
                }
                self
            }
            Slot::Out(i) => self.param(name, ParamType::Out(dtype), Arg::Write(i)),
            Slot::Temp(_) => unreachable!("a temporary has no address"),
        }
    }

    /// A pointer to the packed form of an input that is a weight, as words: see [`crate::plan::packed`].
    pub fn packed(&mut self, name: &str, slot: Slot) -> &mut Self {
        let Slot::In(i) = slot else { unreachable!("a weight is an input") };
        self.param(name, ParamType::In(DType::I32), Arg::Packed(i));
        // Lowering gives such an argument to weights alone.
        if let Some(last) = self.constant.last_mut() {
            *last = true;
        }
        self
    }

    /// A pointer to a state that the kernel writes.
    pub fn state(&mut self, name: &str, slot: Slot) -> &mut Self {
        let dtype = self.ty(slot).0;
        let Slot::In(i) = slot else { unreachable!("a state is an input") };
        self.param(name, ParamType::Out(dtype), Arg::Read(i))
    }

    /// A tensor map of an input of up to three axes, for boxes of `rows` times 128 bytes that lie in shared memory as products of
    /// warpgroups want them (`kernels/include/wgmma.cuh`).
    pub fn map(&mut self, name: &str, slot: Slot, rows: u32) -> &mut Self {
        let TensorType(dtype, shape) = self.ty(slot);
        let Slot::In(read) = slot else { unreachable!("a map is of an input") };
        let axis = |i: usize| shape.len().checked_sub(i + 1).map_or(1, |i| shape[i]);
        self.map_sized(name, read, *dtype, [axis(0), axis(1), axis(2)], rows)
    }

    /// The same of an input of any number of axes, of which all but the innermost are one: the rows of all.
    pub fn row_map(&mut self, name: &str, slot: Slot, rows: u32) -> &mut Self {
        let TensorType(dtype, shape) = self.ty(slot);
        let Slot::In(read) = slot else { unreachable!("a map is of an input") };
        let (last, others) = shape.split_last().map_or((1, &[][..]), |(last, others)| (*last, others));
        self.map_sized(name, read, *dtype, [last, others.iter().product(), 1], rows)
    }

    fn map_sized(&mut self, name: &str, read: u32, dtype: DType, sizes: [u64; 3], rows: u32) -> &mut Self {
        let row = sizes[0] * dtype.bytes();
        let map = TensorMap {
            read,
            sizes,
            strides: [row, row * sizes[1]],
            tile: [(128 / dtype.bytes()) as u32, rows, 1],
            swizzle: Swizzle::Bytes128,
            promotion: Promotion::Bytes256,
        };
        self.param(name, ParamType::Map(dtype), Arg::Map(map))
    }

    /// An integer that the launch passes: what differs between buckets that should share a kernel, such as rows.
    pub fn int(&mut self, name: &str, value: u64) -> &mut Self {
        self.param(name, ParamType::Int, Arg::Int(i32::try_from(value).expect("sizes are i32 by the plan's rules")))
    }

    /// A 64-bit integer that the launch passes.
    pub fn long(&mut self, name: &str, value: i64) -> &mut Self {
        self.param(name, ParamType::Long, Arg::Long(value))
    }

    /// A parameter whose argument the runtime knows.
    pub fn parameter(&mut self, name: &str, ty: ParamType) -> &mut Self {
        self.params.push(Param(name.to_owned(), ty));
        self.constant.push(false);
        self
    }

    /// So many blocks along x form a cluster; they divide the grid.
    pub fn cluster(&mut self, blocks: u32) -> &mut Self {
        self.cluster = blocks;
        self
    }

    /// The kernel lets the next one start only after it has waited itself.
    pub fn releases_late(&mut self) -> &mut Self {
        self.releases_late = true;
        self
    }

    /// An integer that says whether the kernel may read these inputs before it waits, which lowering finds out.
    pub fn early(&mut self, name: &str, inputs: &[Slot]) -> &mut Self {
        let position =
            |slot: &Slot| if let Slot::In(i) = slot { *i } else { unreachable!("only inputs are read early") };
        self.early = inputs.iter().map(position).collect();
        self.param(name, ParamType::Int, Arg::Early)
    }

    /// A counter of the step's own by which blocks claim work; lowering says which one.
    pub fn claim(&mut self, name: &str) -> &mut Self {
        self.param(name, ParamType::Out(DType::I32), Arg::Claim(0))
    }

    fn param(&mut self, name: &str, ty: ParamType, arg: Arg) -> &mut Self {
        self.params.push(Param(name.to_owned(), ty));
        self.constant.push(false);
        self.args.push(arg);
        self
    }

    /// The type of a value of the step.
    pub fn ty(&self, slot: Slot) -> &'a TensorType {
        super::pattern::ty(self.semantic.expect("a service has no operands"), slot)
    }

    /// The specialised kernel: blocks along x, y and z, threads of a block, dynamic shared memory in bytes.
    pub fn finish(self, config: impl Into<String>, grid: [u64; 3], block: u32, shared: u64) -> Specialised {
        let grid = grid.map(|n| u32::try_from(n.max(1)).expect("grids are checked by the twin"));
        let shared = u32::try_from(shared).expect("shared memory is checked by the twin");
        let launch = Launch {
            kernel: 0,
            grid,
            block,
            cluster: self.cluster,
            shared,
            dependent: true,
            releases_late: self.releases_late,
            early: self.early,
            args: self.args,
        };
        Specialised { config: config.into(), params: self.params, launch, constant: self.constant, text: self.text }
    }
}

/// The C++ name of an element type; see `kernels/include/types.cuh`.
pub fn c_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::I32 => "int",
    }
}

/// A number as C++ source, the exact bits.
pub fn c_number(value: f32) -> String {
    match value {
        value if value.is_finite() => format!("{value:e}f"),
        value => format!("__int_as_float(0x{:08x})", value.to_bits()),
    }
}

/// Only constants are `__restrict__`: the compiler may read such memory early and past coherent caches, which is wrong for what
/// a kernel writes that may still run when this one starts.
fn c_param(ty: ParamType, constant: bool) -> String {
    match ty {
        ParamType::In(dtype) if constant => format!("const {}* __restrict__ ", c_type(dtype)),
        ParamType::In(dtype) => format!("const {}* ", c_type(dtype)),
        ParamType::Out(dtype) => format!("{}* ", c_type(dtype)),
        ParamType::Int => "int ".into(),
        ParamType::Long => "long long ".into(),
        ParamType::Float => "float ".into(),
        ParamType::Map(_) => "const __grid_constant__ TensorMap ".into(),
    }
}

/// Kernels of which a thread has so many adjacent elements, each with its number of threads: first the widest that still gives every
/// multiprocessor a few warps, else the narrowest.
pub fn by_width(specialise: impl Fn(u64) -> Option<(u64, Specialised)>) -> Vec<Specialised> {
    let mut found: Vec<(u64, Specialised)> = [8, 4, 2, 1].into_iter().filter_map(specialise).collect();
    let enough = |(threads, _): &(u64, Specialised)| *threads >= PROCESSORS * 128;
    let first = found.iter().position(enough).unwrap_or(found.len().saturating_sub(1));
    let rest = found.split_off(first);
    rest.into_iter().chain(found.into_iter().rev()).map(|(_, specialised)| specialised).collect()
}
