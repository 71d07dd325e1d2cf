//! Typed indices. Each is a position in one table of [`crate::ir::Graph`].

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(pub u32);

        impl $name {
            /// The position in the table.
            pub fn index(self) -> usize {
                self.0 as usize
            }

            /// The id of position `index`; a table of more than 2^32 entries is a bug.
            pub fn new(index: usize) -> Self {
                Self(u32::try_from(index).expect("more than 2^32 entries in one graph table"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A value: a graph input, a state, or the result of an operator.
    ValueId,
    "value"
);
id!(
    /// A weight declaration.
    WeightId,
    "weight"
);
