//! The intermediate representation: typed ids, dimensions, operators, the graph, its text form, its verifier, and the
//! builder of LFM2 graphs from `config.json`. Uses no other room.

mod attributes;
pub mod build;
pub mod config;
mod cursor;
mod fault;
mod graph;
mod ids;
mod lexer;
mod location;
mod op;
mod parse;
mod print;
pub mod shape;
#[cfg(test)]
pub(crate) mod testing;
mod types;
mod users;
mod verify;

pub use attributes::Attribute;
pub use cursor::ParseError;
pub use fault::{Fault, VerifyErrors};
pub use graph::{Graph, Layout, Op, Operand, Value, Weight, outside_operands};
pub use ids::{ValueId, WeightId};
pub use location::{Location, SourceMap};
pub use op::{BinaryFn, OpKind, Stage, TURNS, UnaryFn};
pub use parse::{ParsedGraph, parse};
pub use print::stage_list;
pub use types::{DType, Dim, Extents, Sym, Type};
pub use users::Users;
pub use verify::verify;
