//! The expert choices of plans with forced routing, whose routers choose none themselves.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};

use super::Batch;
use crate::plan::ForcedRouting;

/// The choices of each slot's sequence.
#[derive(Clone, Default, Debug)]
pub struct ForcedExperts {
    /// `[layers, positions, experts a token]` by slot.
    choices: HashMap<i32, Vec<i32>>,
}

impl ForcedExperts {
    /// Sets the choices of a slot's sequence.
    pub fn set(&mut self, slot: i32, choices: Vec<i32>) {
        self.choices.insert(slot, choices);
    }

    /// The choices for the rows of a batch in one layer, counted among those with experts, `[rows, experts a token]`.
    ///
    /// # Errors
    /// A sequence without choices, or with fewer positions than it runs, or an expert that the model does not have.
    pub fn rows(&self, layer: usize, routing: &ForcedRouting, batch: &Batch) -> Result<Vec<i32>> {
        let k = usize::try_from(routing.per_token)?;
        let mut rows = Vec::with_capacity(batch.slots.len() * k);
        for (&slot, &position) in batch.slots.iter().zip(&batch.positions) {
            let choices = self.choices.get(&slot).with_context(|| {
                format!("slot {slot}: the plan was compiled with --forced-routing, and no experts are given; run it by `verify`")
            })?;
            let positions = choices.len() / (k * routing.layers.len()).max(1);
            let at = usize::try_from(position)?;
            if at >= positions {
                bail!("slot {slot}: expected the experts of position {position}, found those of {positions} positions");
            }
            let start = (layer * positions + at) * k;
            let found = &choices[start..start + k];
            if let Some(expert) = found.iter().find(|&&e| e < 0 || e as u64 >= routing.experts) {
                bail!("slot {slot}, position {position}: expected experts below {}, found {expert}", routing.experts);
            }
            rows.extend_from_slice(found);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_slot_and_position() {
        let routing = ForcedRouting { layers: vec![2, 3], experts: 9, per_token: 2 };
        let mut forced = ForcedExperts::default();
        forced.set(5, vec![0, 1, 2, 3, 4, 5, 6, 7]);
        let batch = |slot, position| Batch { slots: vec![slot], positions: vec![position], ..Batch::default() };
        assert_eq!(forced.rows(0, &routing, &batch(5, 1)).unwrap(), [2, 3]);
        assert_eq!(forced.rows(1, &routing, &batch(5, 0)).unwrap(), [4, 5]);
        assert!(forced.rows(0, &routing, &batch(5, 2)).unwrap_err().to_string().contains("2 positions"));
        assert!(forced.rows(0, &routing, &batch(4, 0)).unwrap_err().to_string().contains("--forced-routing"));
        forced.set(5, vec![0, 9, 0, 0]);
        assert!(forced.rows(0, &routing, &batch(5, 0)).unwrap_err().to_string().contains("below 9"));
    }
}
