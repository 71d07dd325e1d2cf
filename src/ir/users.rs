//! Who defines and who uses each value.

use crate::ir::{Graph, ValueId};

/// Who defines and who uses each value, by position in [`Graph::ops`].
pub struct Users {
    /// The users of value `v` are `users[starts[v]..starts[v + 1]]`. One flat list, because it is made anew for each patch.
    users: Vec<usize>,
    starts: Vec<usize>,
    definitions: Vec<Option<usize>>,
    outputs: Vec<bool>,
}

impl Graph {
    /// For each value, the positions in [`Graph::ops`] of the operators that use it, ascending, each once.
    pub fn users(&self) -> Users {
        let count = self.values.len();
        let mut starts = vec![0; count + 1];
        self.each_use(|value, _| starts[value.index() + 1] += 1);
        for value in 0..count {
            starts[value + 1] += starts[value];
        }
        let mut filled = starts.clone();
        let mut users = vec![0; starts[count]];
        self.each_use(|value, at| {
            users[filled[value.index()]] = at;
            filled[value.index()] += 1;
        });
        let mut definitions = vec![None; count];
        for (at, op) in self.ops.iter().enumerate() {
            for result in &op.results {
                definitions[result.index()] = Some(at);
            }
        }
        let mut outputs = vec![false; count];
        for output in &self.outputs {
            outputs[output.index()] = true;
        }
        Users { users, starts, definitions, outputs }
    }

    /// Calls `visit(value, position)` for each operator and each value it uses, once however often it uses it.
    fn each_use(&self, mut visit: impl FnMut(ValueId, usize)) {
        let mut last = vec![usize::MAX; self.values.len()];
        for (at, op) in self.ops.iter().enumerate() {
            for value in op.uses() {
                if last[value.index()] != at {
                    last[value.index()] = at;
                    visit(value, at);
                }
            }
        }
    }
}

impl Users {
    /// Positions of the operators that use a value, ascending.
    pub fn of(&self, value: ValueId) -> &[usize] {
        &self.users[self.starts[value.index()]..self.starts[value.index() + 1]]
    }

    /// Position of the operator that defines a value; none for inputs and states.
    pub fn definition(&self, value: ValueId) -> Option<usize> {
        self.definitions[value.index()]
    }

    /// True if the graph returns the value.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.outputs[value.index()]
    }

    /// The only user of a value that is not returned.
    pub fn only(&self, value: ValueId) -> Option<usize> {
        match self.of(value) {
            [one] if !self.is_output(value) => Some(*one),
            _ => None,
        }
    }
}
