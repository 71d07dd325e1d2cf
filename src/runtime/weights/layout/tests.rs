//! Places of elements, by two rules that share no code.

use proptest::prelude::*;

use super::*;
use crate::plan::Synthetic;

proptest! {
    #[test]
    fn places_say_what_runs_say(
        outer in 1u64..4,
        inner in 1u64..4,
        sizes in prop::collection::vec(0u64..4, 1..4),
        block in prop::option::of(1u64..4),
    ) {
        // In blocks, parts are of one size.
        let sizes: Vec<u64> = match block {
            Some(block) => sizes.iter().map(|_| (sizes[0] + 1) * block).collect(),
            None => sizes,
        };
        let tensor = |size: u64| Tensor {
            name: String::new(),
            dtype: DType::F32,
            index_dtypes: vec![],
            shape: vec![outer, size, inner],
            sources: vec![],
            synthetic: Synthetic { salt: 0, center: 0.0, scale: 0.0 },
        };
        let tensors: Vec<Tensor> = sizes.iter().map(|&size| tensor(size)).collect();
        let ty = TensorType(DType::F32, vec![outer, sizes.iter().sum(), inner]);
        let elements = ty.elements().expect("few");
        let layout = Layout::Concat { axis: 1, block, tensors: (0..sizes.len() as u32).collect() };
        let weight = Weight { name: String::new(), ty, offset: 0, layout, indices: vec![] };
        let gather = Gather::new(&weight, &tensors).expect("they fit");
        let mut seen = 0;
        for at in places(&weight, &tensors).expect("they fit") {
            for i in 0..sizes[at.tensor as usize] * outer * inner {
                let run = gather.run(at.of(i));
                prop_assert_eq!((run.tensor, run.first), (at.tensor, i));
                seen += 1;
            }
        }
        prop_assert_eq!(seen, elements);
    }

    /// A weight of some indices has the elements that the weight of all has there.
    #[test]
    fn some_indices_are_those_of_all(
        taken in prop::sample::subsequence((0..5u64).collect::<Vec<_>>(), 1..5),
        size in 1u64..3,
        inner in 1u64..4,
        interleaved in any::<bool>(),
    ) {
        let tensor = Tensor {
            name: String::new(),
            dtype: DType::F32,
            index_dtypes: vec![],
            shape: vec![5, size, inner],
            sources: vec![],
            synthetic: Synthetic { salt: 0, center: 0.0, scale: 0.0 },
        };
        let tensors = [tensor.clone(), tensor];
        let layout = Layout::Concat { axis: 1, block: interleaved.then_some(size), tensors: vec![0, 1] };
        let of_indices = |indices: Vec<u64>, first| {
            let ty = TensorType(DType::F32, vec![first, 2 * size, inner]);
            Weight { name: String::new(), ty, offset: 0, layout: layout.clone(), indices }
        };
        let weight = |indices: Vec<u64>, first| Gather::new(&of_indices(indices, first), &tensors);
        let all = weight(vec![], 5).expect("it fits");
        let some = weight(taken.clone(), taken.len() as u64).expect("it fits");
        let each = 2 * size * inner;
        let mut position = 0;
        while position < taken.len() as u64 * each {
            let run = some.run(position);
            for i in 0..run.elements {
                let at = position + i;
                let expected = all.run(taken[(at / each) as usize] * each + at % each);
                prop_assert_eq!((run.tensor, run.first + i), (expected.tensor, expected.first));
            }
            position += run.elements;
        }
        // Devices write each element once, from the same places.
        let mut seen = 0;
        for at in places(&of_indices(taken.clone(), taken.len() as u64), &tensors).expect("they fit") {
            for i in at.first..at.first + at.count {
                let run = some.run(at.of(i));
                prop_assert_eq!((run.tensor, run.first), (at.tensor, i));
                seen += 1;
            }
        }
        prop_assert_eq!(seen, taken.len() as u64 * each);
        weight(vec![5], 1).unwrap_err();
        weight(vec![0, 1], 1).unwrap_err();
    }
}
