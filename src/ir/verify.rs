//! What every graph must hold to, before and after each pass. All faults are found at once.
//!
//! Tables
//! 1. Every id lies in its table.
//! 2. Names are of letters, digits and `_.-+/`; scopes too, where there are any. No two values that the graph defines have
//!    one name, nor do two weights.
//! 3. Dimensions are positive; the product of a type's constant factors, in bytes, fits 64 bits.
//!
//! Weights and states
//! 4. A weight has a float type and a constant shape of at least one dimension. A state has a constant shape.
//! 5. The parts of a concatenated weight come before it, are checkpoint tensors, have its element type, agree with it on all
//!    axes but the one they are joined along, and add up to it there. With a block, they are of one size, which the block
//!    divides. A weight that takes indices of another comes after it, and is like it but for the first axis, whose size is their
//!    number; each is one of that axis. The other takes no indices itself.
//!
//! Values
//! 6. Every value is defined once: as an input, as a state or as one result of one primitive operator.
//! 7. Every value is used after its definition, operators of a body being in the place of their fused operator.
//! 8. Outputs are defined, and no value is returned twice.
//!
//! Operators
//! 9. Operand and result count, shapes and element types obey [`shape`](crate::ir::shape).
//! 10. A number is an operand only of a function of two, whose other operand is no number. Weights stand where an operator
//!     takes a weight, and nowhere else but in elementwise operators. Numbers, attributes included, are finite.
//!
//! State versions
//! 11. An operator that updates a state takes a state or a version of one.
//! 12. A version is updated at most once, and every use of it, being returned included, comes before that update.
//! 13. The last version of every updated state is returned.
//!
//! Fused operators
//! 14. Only a fused operator has a body. The body is not empty, and of primitive operators; there is at least one stage.
//! 15. The operands are what the body takes from outside, in order of first use.
//! 16. The results are those values of the body that are used outside or returned, each once; no other is visible outside.

mod fusion;
mod state;
mod tables;
mod values;

use crate::ir::fault::VerifyErrors;
use crate::ir::{Graph, Location, Op};

/// Checks all invariants.
///
/// # Errors
/// All faults.
pub fn verify(graph: &Graph) -> Result<(), VerifyErrors> {
    let mut faults = Faults { list: vec![] };
    tables::check_ids(graph, &mut faults);
    if faults.list.is_empty() {
        tables::check(graph, &mut faults);
        values::check(graph, &mut faults);
        state::check(graph, &mut faults);
        fusion::check(graph, &mut faults);
    }
    VerifyErrors::check(graph, faults.list)
}

struct Faults {
    list: Vec<(Location, String)>,
}

impl Faults {
    fn add(&mut self, location: Location, message: impl Into<String>) {
        self.list.push((location, message.into()));
    }
}

/// The primitive operators in program order, with their places; bodies stand for fused operators.
fn primitives(graph: &Graph) -> impl Iterator<Item = (Location, &Op)> {
    graph.ops.iter().enumerate().flat_map(|(at, op)| {
        op.primitives().iter().enumerate().map(move |(inner, primitive)| {
            let location = if op.body.is_empty() { Location::Op(at) } else { Location::Body(at, inner) };
            (location, primitive)
        })
    })
}

#[cfg(test)]
mod tests;
