//! What a plan may use beside kernels over its weights as they are.

/// Which weights get a packed form (see [`crate::plan::packed`]), and whether kernels may read it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Pack {
    /// None: kernels that read one are no candidates.
    #[default]
    Never,
    /// Those of which a step's kernel reads it.
    Asked,
    /// All that can have one, so that plans with other kernels have the same pool: for measurements.
    All,
}

/// Whether steps may be calls of cuBLASLt.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Libraries {
    /// None is: the library is no candidate, and no plan needs it.
    #[default]
    Never,
    /// Those are for which tactics choose it.
    Asked,
    /// The same, with room and order for all that could be, so that plans which choose otherwise have the same pool and dependencies: for
    /// measurements.
    All,
}

/// What candidates may use.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// Packed weights.
    pub pack: Pack,
    /// Libraries.
    pub libraries: Libraries,
}

impl Allowed {
    /// The same, with all that could be used for each of the two that may be used: for plans that are measured beside each other.
    pub fn for_measurements(self) -> Allowed {
        let pack = if self.pack == Pack::Never { Pack::Never } else { Pack::All };
        let libraries = if self.libraries == Libraries::Never { Libraries::Never } else { Libraries::All };
        Allowed { pack, libraries }
    }
}

impl From<Pack> for Allowed {
    fn from(pack: Pack) -> Allowed {
        Allowed { pack, ..Allowed::default() }
    }
}

impl From<Libraries> for Allowed {
    fn from(libraries: Libraries) -> Allowed {
        Allowed { libraries, ..Allowed::default() }
    }
}
