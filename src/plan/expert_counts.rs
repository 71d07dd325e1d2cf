//! How often experts were chosen: what `run --count-experts` writes and `compile --expert-counts` reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The scope of a step by its name: `layers.3.ffn` of `layers.3.ffn.norm+router` and of `layers.3.ffn.matmul.2`.
pub fn scope(name: &str) -> &str {
    let parent = |name| str::rsplit_once(name, '.').map_or("", |(parent, _)| parent);
    match name.rsplit_once('.') {
        // A number tells steps of one label apart.
        Some((rest, last)) if last.bytes().all(|c| c.is_ascii_digit()) => parent(rest),
        _ => parent(name),
    }
}

/// Choices by layer.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertCounts {
    /// Of the model, as in [`Model`](crate::plan::Model).
    pub config_hash: String,
    /// By the scope of a layer's steps, such as `layers.3.ffn`: for each expert, how many rows chose it.
    pub layers: BTreeMap<String, Vec<u64>>,
}

impl ExpertCounts {
    /// None yet, of that model.
    pub fn new(config_hash: &str) -> ExpertCounts {
        ExpertCounts { config_hash: config_hash.to_owned(), layers: BTreeMap::new() }
    }

    /// Both together, of one model.
    #[must_use]
    pub fn and(mut self, other: ExpertCounts) -> ExpertCounts {
        for (scope, counts) in other.layers {
            let own = self.layers.entry(scope).or_insert_with(|| vec![0; counts.len()]);
            own.iter_mut().zip(counts).for_each(|(own, count)| *own += count);
        }
        self
    }

    /// Adds what rows chose of so many experts; negative numbers are no choice.
    pub fn add(&mut self, scope: &str, experts: usize, chosen: &[i32]) {
        let counts = self.layers.entry(scope.to_owned()).or_insert_with(|| vec![0; experts]);
        for &expert in chosen {
            if let Some(count) = usize::try_from(expert).ok().and_then(|expert| counts.get_mut(expert)) {
                *count += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_names_without_labels() {
        assert_eq!(scope("layers.3.ffn.norm+router+group"), "layers.3.ffn");
        assert_eq!(scope("layers.3.ffn.matmul.2"), "layers.3.ffn");
        assert_eq!(scope("head.sample"), "head");
        assert_eq!(scope("pointwise"), "");
        assert_eq!(scope("pointwise.2"), "");
    }
}
