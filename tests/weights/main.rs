//! Checkpoints and synthetic numbers into the weights region, in every form, type and layout.

mod common;
mod device;
mod errors;

use std::sync::Mutex;

use common::*;
use lfm2c::codegen::{CompileOptions, Recipe};
use lfm2c::ir;
use lfm2c::passes::Target;
use lfm2c::plan::{DType, Layout, Manifest, Tensor, TensorSource, TensorType, Weight};
use lfm2c::runtime::weights::{Checkpoint, Origin, Room, fill_synthetic, load, total_bytes};
use proptest::prelude::*;

/// What the weight must hold, by its definition: one element at a time.
fn expected(weight: &Weight, tensors: &[Tensor]) -> Vec<u8> {
    let TensorType(dtype, shape) = &weight.ty;
    let numbers = |t: u32| values(tensors[t as usize].dtype, &stored(&tensors[t as usize]));
    let elements: Vec<f32> = match &weight.layout {
        Layout::Copy(t) => numbers(*t),
        Layout::Concat { axis, block, tensors: parts } => {
            let axis = *axis as usize;
            let numbers: Vec<Vec<f32>> = parts.iter().map(|&t| numbers(t)).collect();
            let sizes: Vec<u64> = parts.iter().map(|&t| tensors[t as usize].shape[axis]).collect();
            let inner: u64 = shape[axis + 1..].iter().product();
            let place = |along: u64| match block {
                Some(block) => {
                    let turn = along / block;
                    let count = parts.len() as u64;
                    ((turn % count) as usize, turn / count * block + along % block)
                }
                None => {
                    let (mut part, mut along) = (0, along);
                    while along >= sizes[part] {
                        along -= sizes[part];
                        part += 1;
                    }
                    (part, along)
                }
            };
            (0..shape.iter().product())
                .map(|i: u64| {
                    let (outer, along, within) = (i / inner / shape[axis], i / inner % shape[axis], i % inner);
                    let (part, along) = place(along);
                    numbers[part][((outer * sizes[part] + along) * inner + within) as usize]
                })
                .collect()
        }
    };
    written(*dtype, &elements)
}

/// Room of a device: parts and the spans that it places, from the smallest to more than one task of a thread.
const ROOMS: [Room; 4] = [
    Room { part_bytes: 256, placed_bytes: 256 },
    Room { part_bytes: 1024, placed_bytes: 512 },
    Room { part_bytes: 4096, placed_bytes: 16384 },
    Room { part_bytes: 3 << 20, placed_bytes: 2 << 20 },
];

/// Loads, checks every byte of the region and the progress, and that synthetic numbers and a device give the same.
fn check_weights(manifest: &Manifest, checkpoint: &Checkpoint) {
    let program = &manifest.ranks[0];
    let mut want = vec![0x5a; program.pool.weights.bytes as usize + 3];
    for weight in &program.weights {
        let bytes = expected(weight, &manifest.tensors);
        want[weight.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    let fill = |synthetic: bool| {
        let mut region = vec![0x5a; want.len()];
        let calls = Mutex::new(vec![0]);
        let progress = |bytes| calls.lock().unwrap().push(bytes);
        if synthetic {
            fill_synthetic(manifest, program, SEED, &mut region, &progress).unwrap();
        } else {
            load(manifest, program, checkpoint, &mut region, &progress).unwrap();
        }
        let calls = calls.into_inner().unwrap();
        assert!(calls.is_sorted(), "{calls:?}");
        assert_eq!(calls.last(), Some(&total_bytes(program)));
        region
    };
    assert!(fill(false) == want, "checkpoint");
    assert!(fill(true) == want, "synthetic");
    // Small parts of large weights would only take long.
    for room in ROOMS.into_iter().filter(|room| want.len() / room.part_bytes < 100) {
        for origin in [Origin::Checkpoint(checkpoint), Origin::Synthetic(SEED)] {
            let mut region = vec![0x5a; want.len()];
            device::load(manifest, origin, room, &mut region);
            assert!(region == want, "on a device, {room:?}");
        }
    }
}

#[test]
fn a_mixed_checkpoint_in_one_file() {
    use DType::*;
    let experts = |name: &str, dtype| {
        let sources = vec![TensorSource::PerIndex(format!("experts.{{}}.{name}")), TensorSource::Whole("no".into())];
        tensor(name, dtype, &[3, 4, 5], sources)
    };
    let tensors =
        vec![whole("embed", BF16, &[7, 5]), whole("conv", F32, &[5, 3]), experts("w1", F16), experts("w3", BF16)];
    let mut items: Vec<Item> = tensors.iter().flat_map(items).collect();
    items.iter_mut().find(|(name, ..)| name == "conv").unwrap().2 = vec![5, 1, 3];
    items.push(item("lm_head.weight", F32, &[2]));
    items.push(item("layers.0.rotary_emb.inv_freq", F32, &[2]));
    let gate_up = Layout::Concat { axis: 1, block: Some(2), tensors: vec![2, 3] };
    // In no order and with gaps between them.
    let weights = vec![
        weight(BF16, &[3, 8, 5], 512, gate_up),
        weight(BF16, &[7, 5], 0, Layout::Copy(0)),
        weight(F16, &[5, 3], 256, Layout::Copy(1)),
    ];
    let (_dir, checkpoint) = single(&items);
    check_weights(&manifest(tensors, weights), &checkpoint);
    let listing = checkpoint.listing();
    assert_eq!(listing["conv"], (F32, vec![5, 1, 3]));
    assert_eq!(listing["experts.2.w1"], (F16, vec![4, 5]));
    assert_eq!(listing.len(), items.len());
}

#[test]
fn packed_experts_when_the_first_form_is_absent() {
    let part = |name: &str, start| {
        let packed = TensorSource::Part { name: "gate_up_proj".into(), start, of: 8 };
        tensor(name, DType::BF16, &[3, 4, 5], vec![packed, TensorSource::PerIndex(format!("experts.{{}}.{name}"))])
    };
    let mut tensors = vec![part("w1", 0), part("w3", 4)];
    let rows = |t: &Tensor| stored(t).chunks(4 * 5 * 2).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let (w1, w3) = (rows(&tensors[0]), rows(&tensors[1]));
    let packed = w1.iter().zip(&w3).flat_map(|(a, b)| [a.clone(), b.clone()].concat()).collect();
    tensors.iter_mut().for_each(|t| t.sources.reverse());
    let (_dir, checkpoint) = single(&[("gate_up_proj".into(), DType::BF16, vec![3, 8, 5], packed)]);
    let layout = |block| Layout::Concat { axis: 1, block, tensors: vec![0, 1] };
    let weights =
        vec![weight(DType::BF16, &[3, 8, 5], 0, layout(None)), weight(DType::F32, &[3, 8, 5], 256, layout(Some(1)))];
    check_weights(&manifest(tensors, weights), &checkpoint);
}

#[test]
fn weights_larger_than_one_task() {
    let tensors = vec![whole("a", DType::F32, &[3, 100_001]), whole("b", DType::BF16, &[5, 100_001])];
    let joined = Layout::Concat { axis: 0, block: None, tensors: vec![0, 1] };
    let weights = vec![
        weight(DType::F32, &[8, 100_001], 0, joined),
        weight(DType::F16, &[3, 100_001], 4_000_000, Layout::Copy(0)),
        weight(DType::F32, &[5, 100_001], 8_000_000, Layout::Copy(1)),
    ];
    let (_dir, checkpoint) = single(&tensors.iter().flat_map(items).collect::<Vec<_>>());
    check_weights(&manifest(tensors, weights), &checkpoint);
}

#[test]
fn a_type_for_each_index() {
    let mut mixed = tensor("e", DType::F32, &[3, 2], vec![TensorSource::PerIndex("e.{}".into())]);
    mixed.index_dtypes = vec![DType::BF16, DType::F32, DType::F16];
    let numbers = [[1.0, -2.0], [0.1, 3.0], [0.5, 65504.0]];
    let item = |i: usize, dtype: DType| (format!("e.{i}"), dtype, vec![2], written(dtype, &numbers[i]));
    let types = mixed.index_dtypes.clone();
    let items: Vec<Item> = types.iter().enumerate().map(|(i, &dtype)| item(i, dtype)).collect();
    let manifest = manifest(vec![mixed], vec![weight(DType::F32, &[3, 2], 0, Layout::Copy(0))]);
    let mut region = vec![0; 24];
    let (_dir, checkpoint) = single(&items);
    load(&manifest, &manifest.ranks[0], &checkpoint, &mut region, &|_| {}).unwrap();
    assert_eq!(values(DType::F32, &region), numbers.concat());
    region.fill(0);
    let moved = device::load(&manifest, Origin::Checkpoint(&checkpoint), ROOMS[0], &mut region);
    assert_eq!(values(DType::F32, &region), numbers.concat());
    assert_eq!(moved, [2, 4, 0], "what has the type of the weight is copied");
    let (_dir, other) = single(&[item(0, DType::BF16), item(1, DType::F16), item(2, DType::F16)]);
    let error = load(&manifest, &manifest.ranks[0], &other, &mut region, &|_| {}).unwrap_err().to_string();
    assert!(error.contains("mistyped `e.1`: expected F32, found F16") && !error.contains("`e.0`"), "{error}");
}

#[test]
fn a_device_moves_vectors_where_blocks_are_of_eights() {
    use DType::*;
    let tensors = vec![whole("a", BF16, &[3, 32, 24]), whole("b", BF16, &[3, 32, 24]), whole("c", F32, &[33, 8])];
    let gate_up = Layout::Concat { axis: 1, block: Some(16), tensors: vec![0, 1] };
    let weights = vec![
        weight(BF16, &[3, 64, 24], 0, gate_up),
        weight(BF16, &[33, 8], 9216, Layout::Copy(2)),
        weight(F32, &[33, 8], 9984, Layout::Copy(2)),
    ];
    let (_dir, checkpoint) = single(&tensors.iter().flat_map(items).collect::<Vec<_>>());
    let manifest = manifest(tensors, weights);
    check_weights(&manifest, &checkpoint);
    for room in ROOMS {
        let moved = device::load(&manifest, Origin::Checkpoint(&checkpoint), room, &mut [0; 12000]);
        assert_eq!(moved, [33 * 8, 0, 3 * 64 * 24 + 33 * 8]);
    }
}

/// Of some indices, whether they are neighbours or not.
#[test]
fn a_device_loads_some_experts() {
    use DType::*;
    let tensors = vec![whole("a", BF16, &[5, 16, 8]), whole("b", BF16, &[5, 16, 8]), whole("c", F32, &[5, 8, 16])];
    let gate_up = Layout::Concat { axis: 1, block: Some(8), tensors: vec![0, 1] };
    for indices in [vec![0, 1], vec![3, 4], vec![1, 3], vec![0, 2, 3], vec![4]] {
        let count = indices.len() as u64;
        let offset = (count * 32 * 8 * 2).next_multiple_of(256);
        let mut weights = vec![
            weight(BF16, &[count, 32, 8], 0, gate_up.clone()),
            weight(BF16, &[count, 8, 16], offset, Layout::Copy(2)),
        ];
        weights.iter_mut().for_each(|weight| weight.indices = indices.clone());
        let (_dir, checkpoint) = single(&tensors.iter().flat_map(items).collect::<Vec<_>>());
        let manifest = manifest(tensors.clone(), weights);
        for room in ROOMS {
            for synthetic in [false, true] {
                let mut want = vec![0; (offset + count * 8 * 16 * 2) as usize];
                let (program, mut region) = (&manifest.ranks[0], want.clone());
                let origin = if synthetic { Origin::Synthetic(SEED) } else { Origin::Checkpoint(&checkpoint) };
                match synthetic {
                    true => fill_synthetic(&manifest, program, SEED, &mut want, &|_| {}).unwrap(),
                    false => load(&manifest, program, &checkpoint, &mut want, &|_| {}).unwrap(),
                }
                device::load(&manifest, origin, room, &mut region);
                assert!(region == want, "{indices:?}, {room:?}");
            }
        }
    }
}

/// As tests/gpu/load.rs has it loaded by a GPU.
#[test]
fn plans_for_a_device_have_the_kernels_that_checkpoints_of_all_types_need() {
    for stored in [Stored::Bf16, Stored::F32, Stored::Mixed] {
        for dtype in [ir::DType::F32, ir::DType::BF16, ir::DType::F16] {
            let options = CompileOptions {
                target: Target::Sm90a,
                without_cubins: true,
                dtype: Some(dtype),
                prefill: Some(vec![]),
                decode: Some(vec![1]),
                ..CompileOptions::default()
            };
            let recipe = Recipe::parse(include_str!("../../plans/synthetic.ron")).unwrap();
            let manifest = plan(recipe, stored, &options).manifest;
            let (_dir, checkpoint) = single(&manifest.tensors.iter().flat_map(items).collect::<Vec<_>>());
            let mut want = vec![0; manifest.ranks[0].pool.weights.bytes as usize];
            load(&manifest, &manifest.ranks[0], &checkpoint, &mut want, &|_| {}).unwrap();
            let mut region = vec![0; want.len()];
            let moved = device::load(&manifest, Origin::Checkpoint(&checkpoint), ROOMS[3], &mut region);
            assert!(region == want, "{dtype} from {stored:?}");
            assert!(moved[1] == 0 && moved[2] > 0, "sizes of multiples of eight go in vectors: {moved:?}");
        }
    }
}

#[derive(Debug, Clone)]
struct Case {
    shape: Vec<u64>,
    axis: usize,
    block: Option<u64>,
    sizes: Vec<u64>,
    /// Type and form of each part.
    parts: Vec<(DType, usize)>,
    dtype: DType,
}

fn case() -> impl Strategy<Value = Case> {
    let dtype = || prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]);
    let parts = prop::collection::vec((dtype(), 0usize..3, 1u64..5), 1..4);
    (prop::collection::vec(1u64..5, 3), 0usize..3, prop::option::of(1u64..4), parts, dtype()).prop_map(
        |(mut shape, axis, block, parts, dtype)| {
            let sizes: Vec<u64> = parts.iter().map(|p| block.map_or(p.2, |block| block * parts[0].2)).collect();
            shape[axis] = sizes.iter().sum();
            Case { shape, axis, block, sizes, parts: parts.iter().map(|p| (p.0, p.1)).collect(), dtype }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_form_type_and_layout(case in case()) {
        let tensors: Vec<Tensor> = case.parts.iter().zip(&case.sizes).enumerate().map(|(i, (&(dtype, form), &size))| {
            let mut shape = case.shape.clone();
            shape[case.axis] = size;
            let source = match form {
                0 => TensorSource::Whole(format!("t{i}")),
                1 => TensorSource::PerIndex(format!("t{i}.{{}}.weight")),
                _ => TensorSource::Part { name: format!("t{i}"), start: i as u64, of: shape[1] + 2 },
            };
            tensor(&format!("t{i}"), dtype, &shape, vec![source])
        }).collect();
        let layout = Layout::Concat { axis: case.axis as u32, block: case.block, tensors: (0..tensors.len() as u32).collect() };
        let weights = vec![
            weight(case.dtype, &case.shape, 4, layout),
            weight(case.dtype, &tensors[0].shape, 4096, Layout::Copy(0)),
        ];
        let (_dir, checkpoint) = single(&tensors.iter().flat_map(items).collect::<Vec<_>>());
        check_weights(&manifest(tensors, weights), &checkpoint);
    }
}

#[test]
fn a_sharded_checkpoint() {
    let tensors = vec![
        whole("a", DType::F32, &[2, 3]),
        tensor("e", DType::BF16, &[3, 2, 2], vec![TensorSource::PerIndex("e.{}".to_string())]),
    ];
    let all: Vec<Item> = tensors.iter().flat_map(items).collect();
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("one.safetensors"), &all[..2]);
    write(&dir.path().join("two.safetensors"), &all[2..]);
    let (one, two) = ("one.safetensors", "two.safetensors");
    index(dir.path(), &[("a", one), ("e.0", one), ("e.1", two), ("e.2", two)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors().map(|t| t.name).collect::<Vec<_>>(), ["a", "e.0", "e.1", "e.2"]);
    assert_eq!(checkpoint.tensor("e.2").unwrap().data, all[3].3);
    let weights =
        vec![weight(DType::F32, &[2, 3], 0, Layout::Copy(0)), weight(DType::BF16, &[3, 2, 2], 256, Layout::Copy(1))];
    check_weights(&manifest(tensors, weights), &checkpoint);
}

#[test]
fn synthetic_weights_are_never_constant() {
    let tensors = vec![whole("a", DType::BF16, &[64, 33]), whole("b", DType::F16, &[64, 33])];
    let weights =
        vec![weight(DType::BF16, &[64, 33], 0, Layout::Copy(0)), weight(DType::BF16, &[64, 33], 8192, Layout::Copy(1))];
    let manifest = manifest(tensors, weights);
    let fill = |seed| {
        let mut region = vec![0; manifest.ranks[0].pool.weights.bytes as usize];
        fill_synthetic(&manifest, &manifest.ranks[0], seed, &mut region, &|_| {}).unwrap();
        [0, 8192].map(|at| values(DType::BF16, &region[at..][..64 * 33 * 2]))
    };
    let ([a, b], [c, d]) = (fill(1), fill(2));
    for values in [&a, &b, &c, &d] {
        for row in values.chunks(33) {
            assert!(row.iter().any(|v| *v != row[0]));
        }
        assert!(values.iter().all(|v| (-2.5..=3.5).contains(v)));
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!((mean - 0.5).abs() < 0.2, "{mean}");
    }
    let equal = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(x, y)| x == y).count();
    for (x, y) in [(&a, &b), (&a, &c), (&a, &d), (&b, &d)] {
        assert!(equal(x, y) < x.len() / 20, "seeds and tensors give other numbers");
    }
    assert_eq!(fill(1), [a, b]);
}
