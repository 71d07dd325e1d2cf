//! The intermediate representation: typed ids, dimensions, operators, the graph, its text form, its verifier, and the
//! builder of LFM2 graphs from `config.json`. Uses no other room.

pub mod build;
pub mod config;
mod graph;
mod ids;
mod op;
mod print;
pub mod shape;
mod types;
mod users;

pub use graph::{Graph, Layout, Op, Operand, Value, Weight};
pub use ids::{ValueId, WeightId};
pub use op::{Attribute, BinaryFn, OpKind, Stage, UnaryFn};
pub use print::stage_list;
pub use types::{DType, Dim, Extents, Sym, Type};
pub use users::Users;
