//! What does not fit is told by name.

use lfm2c::plan::{DType, Layout, TensorSource};
use lfm2c::runtime::weights::{
    Checkpoint, CheckpointError, CheckpointMismatch, Misshapen, Missing, Mistyped, Origin, Room, Transfer, WeightError,
    check, fill_synthetic, load,
};

use crate::common::*;

#[test]
fn reports_every_mismatch_at_once() {
    use DType::*;
    let experts = |name: &str| {
        let packed = TensorSource::Part { name: "gate_up_proj".into(), start: 0, of: 4 };
        tensor(name, BF16, &[3, 2, 5], vec![TensorSource::PerIndex(format!("experts.{{}}.{name}")), packed])
    };
    let tensors = vec![
        whole("right", F32, &[2]),
        whole("absent", F32, &[2]),
        whole("turned", F32, &[2, 3]),
        whole("other", BF16, &[4]),
        experts("w1"),
        experts("w3"),
    ];
    let found = [
        item("right", F32, &[2]),
        item("turned", F32, &[3, 2]),
        item("other", F32, &[5]),
        item("experts.0.w1", BF16, &[2, 5]),
        item("experts.2.w1", F16, &[2, 5]),
        item("experts.3.w1", BF16, &[2, 5]),
        item("surplus", F32, &[1]),
    ];
    let (dir, checkpoint) = single(&found);
    let manifest = manifest(tensors, vec![]);
    let error = check(&manifest, &checkpoint).unwrap_err();
    let missing = |name: &str, forms: &[&str]| Missing {
        name: name.to_string(),
        forms: forms.iter().map(|form| form.to_string()).collect(),
    };
    let misshapen = |name: &str, expected: &[u64], found: &[u64]| Misshapen {
        name: name.to_string(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    };
    let mistyped = |name: &str, found| Mistyped { name: name.to_string(), expected: BF16, found };
    let expected = CheckpointMismatch {
        dir: dir.path().to_owned(),
        missing: vec![
            missing("absent", &[]),
            missing("experts.1.w1", &[]),
            missing("w3", &["experts.{}.w3", "gate_up_proj"]),
        ],
        misshapen: vec![misshapen("other", &[4], &[5]), misshapen("turned", &[2, 3], &[3, 2])],
        mistyped: vec![mistyped("experts.2.w1", F16), mistyped("other", F32)],
        unexpected: vec!["experts.3.w1".to_string(), "surplus".to_string()],
    };
    let text = error.to_string();
    let WeightError::Mismatch(found) = error else { panic!("{error}") };
    assert_eq!(found, expected);
    for line in [
        "tensors 3 missing, 2 misshapen, 2 mistyped, 2 unexpected",
        "  missing `w3`, expected as `experts.{}.w3` or `gate_up_proj`",
        "  misshapen `turned`: expected [2, 3], found [3, 2]",
        "  mistyped `other`: expected BF16, found F32",
        "  unexpected `surplus`",
        "compile again with `--model DIR`",
    ] {
        assert!(text.contains(line), "expected {line:?} in\n{text}");
    }
    let mut region = [0x5a; 64];
    assert!(load(&manifest, &manifest.ranks[0], &checkpoint, &mut region, &|_| {}).is_err());
    assert_eq!(region, [0x5a; 64], "nothing is written before all is found");
    let room = Room { part_bytes: 256, placed_bytes: 256 };
    let transfer = Transfer::new(&manifest, &manifest.ranks[0], Origin::Checkpoint(&checkpoint), room);
    assert!(matches!(transfer, Err(WeightError::Mismatch(found)) if found == expected));
}

#[test]
fn a_plan_that_contradicts_itself_is_an_error() {
    use DType::*;
    let tensors = || {
        let per_index = |name: &str| vec![TensorSource::PerIndex(name.to_string())];
        vec![whole("a", F32, &[2, 4]), whole("b", F32, &[3, 4]), tensor("c", I32, &[1, 4], per_index("c.{}"))]
    };
    let concat = |axis, block, tensors: &[u32]| Layout::Concat { axis, block, tensors: tensors.to_vec() };
    let copy = |shape: &[u64], offset| weight(F32, shape, offset, Layout::Copy(0));
    let cases = [
        (vec![copy(&[2, 5], 0)], "expected `a` with the elements of [2, 5], found [2, 4]"),
        (vec![weight(F32, &[1], 0, Layout::Copy(9))], "expected the position of one of 3 tensors, found 9"),
        (vec![weight(F32, &[4], 0, Layout::Copy(2))], "type F32 cannot be made of `c`, I32"),
        (vec![weight(F32, &[5, 4], 0, concat(2, None, &[0, 1]))], "expected an axis below 2, found 2"),
        (vec![weight(F32, &[6, 4], 0, concat(0, None, &[0, 1]))], "expected parts that add up to 6 on axis 0, found 5"),
        (
            vec![weight(F32, &[2, 8], 0, concat(1, None, &[0, 1]))],
            "expected `b` with the shape [2, 8] except on axis 1",
        ),
        (vec![weight(F32, &[5, 4], 0, concat(0, Some(1), &[0, 1]))], "parts of one size that `block = 1` divides"),
        (vec![weight(F32, &[4, 4], 0, concat(0, Some(0), &[0, 0]))], "parts of one size that `block = 0` divides"),
        (
            vec![copy(&[2, 4], 0), copy(&[2, 4], 31)],
            "weight `w31` of the plan: expected an offset of at least 32, found 31",
        ),
        (vec![copy(&[2, 4], 481)], "expected a place within 512 bytes, found 32 at 481"),
        (vec![copy(&[1 << 62, 4], 0)], "overflows"),
        (vec![copy(&[2, 4], u64::MAX)], "expected a place within 512 bytes"),
    ];
    for (weights, expected) in cases {
        let mut manifest = manifest(tensors(), vec![]);
        manifest.ranks[0].weights = weights;
        let error = fill_synthetic(&manifest, &manifest.ranks[0], 0, &mut [0; 512], &|_| {}).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("compile it again"), "expected {expected:?} in {error:?}");
    }

    let (_dir, checkpoint) = single(&[]);
    let part = |start, of| TensorSource::Part { name: "p".into(), start, of };
    let per_index = |pattern: &str| TensorSource::PerIndex(pattern.to_string());
    let cases = [
        (vec![2u64, 4], part(1, 4), "expected a part of 4 indices of `p`, found 4 from 1 on"),
        (vec![2, 4], part(u64::MAX, u64::MAX), "expected a part of"),
        (vec![4], part(0, 4), "expected more axes than [4] has"),
        (vec![], per_index("p.{}"), "expected more axes than [] has"),
        (vec![1 << 40, 1], per_index("p.{}"), "expected at most"),
        (vec![2, 1], per_index("p"), "expected `{}` for the index in the name"),
    ];
    for (shape, source, expected) in cases {
        let manifest = manifest(vec![tensor("t", F32, &shape, vec![source])], vec![]);
        let error = check(&manifest, &checkpoint).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("tensor `t`"), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn damaged_directories_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let fails = |expected: &[&str]| {
        let error: CheckpointError = Checkpoint::open(path).unwrap_err();
        let text = error.to_string();
        for part in expected {
            assert!(text.contains(part), "expected {part:?} in {text:?}");
        }
        assert!(text.contains(&*path.to_string_lossy()), "{text}");
    };
    fails(&["expected `model.safetensors` or `model.safetensors.index.json`, found neither"]);
    assert!(matches!(Checkpoint::open(&path.join("no")), Err(CheckpointError::NotFound { .. })));

    let index_file = path.join("model.safetensors.index.json");
    for text in ["", "{", "[]", "{\"weight_map\": 3}", "{}", "{\"weight_map\": {\"a\": 1}}"] {
        std::fs::write(&index_file, text).unwrap();
        fails(&["model.safetensors.index.json: expected JSON with `weight_map`"]);
    }
    index(path, &[("a", "one.safetensors"), ("a", "two.safetensors")]);
    fails(&["duplicate tensor `a`"]);
    for shard in ["../one.safetensors", "/etc/passwd", "", "..", "sub/one.safetensors"] {
        index(path, &[("a", shard)]);
        fails(&["tensor `a`: expected the name of a file beside the index", shard]);
    }

    write(&path.join("one.safetensors"), &[item("a", DType::F32, &[2])]);
    index(path, &[("a", "one.safetensors"), ("b", "two.safetensors"), ("c", "two.safetensors")]);
    fails(&["two.safetensors: expected this shard", "for 2 tensors such as `b`"]);
    write(&path.join("two.safetensors"), &[item("c", DType::F32, &[2])]);
    fails(&["two.safetensors: expected 1 more tensors", ": b;"]);
    write(&path.join("two.safetensors"), &["a", "b", "c"].map(|name| item(name, DType::F32, &[2])));
    fails(&["two.safetensors: expected tensor `a` in one file, found it in ", "one.safetensors too"]);
    std::fs::write(path.join("two.safetensors"), "").unwrap();
    fails(&["two.safetensors: expected 8 bytes with the header's length, found 0"]);
    std::fs::remove_file(path.join("two.safetensors")).unwrap();
    std::fs::create_dir(path.join("two.safetensors")).unwrap();
    fails(&["two.safetensors: cannot be read: expected a file"]);

    // A single file goes before the index, damaged as it is.
    std::fs::write(path.join("model.safetensors"), [9; 40]).unwrap();
    fails(&["model.safetensors: expected a header of at most"]);
    write(&path.join("model.safetensors"), &[item("a", DType::F32, &[2])]);
    let mut bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(path).unwrap().listing().len(), 1);
    bytes.pop();
    std::fs::write(path.join("model.safetensors"), bytes).unwrap();
    fails(&["model.safetensors: expected 8 bytes of tensors after the header, found 7"]);
}
