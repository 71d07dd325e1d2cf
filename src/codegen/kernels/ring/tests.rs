//! What candidates a product has, and what their texts say.

use super::*;
use crate::codegen::kernels::product::samples::{self, Sample};
use crate::plan::{DType, Phase};

fn found(sample: &Sample) -> Vec<Specialised> {
    let problem = Problem { semantic: &sample.semantic, phase: sample.phase };
    Ring.candidates(&problem)
}

/// Those that read weights as they are.
fn plain(sample: &Sample) -> Vec<Specialised> {
    found(sample).into_iter().filter(|one| !one.config.contains("packed")).collect()
}

#[test]
fn every_body_of_few_rows_has_candidates() {
    use DType::{BF16, F16, F32};
    for (x, w) in [(BF16, BF16), (F16, F16), (F32, BF16), (F32, F32), (F16, BF16)] {
        let of_one_matrix = samples::all(x, w).into_iter().chain(samples::small(x, w));
        for sample in of_one_matrix.chain(samples::convolved(x, w)) {
            let rows: u64 = sample.name.split('_').find_map(|part| part.parse().ok()).expect("a number of rows");
            let routed = sample.semantic.inputs[1].1.len() == 3;
            let most = if x == w && x != F32 {
                16
            } else if routed {
                8
            } else {
                4
            };
            assert!(rows > most || !found(&sample).is_empty(), "{} {x:?} {w:?}", sample.name);
        }
    }
    // Rows that two tiles have, or a tile and a half.
    let half = DType::BF16;
    assert!(!found(&samples::matmul(half, half, 16, 64, 64)).is_empty());
    assert!(!found(&samples::matmul(half, half, 4, 24, 64)).is_empty());
}

#[test]
fn bodies_of_other_sizes_or_wires_have_none() {
    let half = DType::F16;
    assert!(found(&samples::matmul(half, half, 17, 64, 64)).is_empty(), "too many rows");
    assert!(found(&samples::matmul(DType::F32, half, 5, 64, 64)).is_empty(), "too many rows in f32");
    assert!(found(&samples::matmul(half, half, 4, 20, 64)).is_empty(), "rows that no tile divides");
    assert!(found(&samples::matmul(half, half, 4, 64, 60)).is_empty(), "columns that no copy divides");
    for sample in samples::broken(half) {
        assert!(found(&sample).is_empty(), "{}", sample.name);
    }
    let mut prefill = samples::short_conv(half, half, 4, 64, false);
    assert!(!found(&prefill).is_empty());
    prefill.phase = Phase::Prefill;
    assert!(found(&prefill).is_empty(), "rows of one sequence");
    assert!(found(&samples::gated(half, half, 4, [36, 3], 64, false)).is_empty(), "bands that no tile divides");
    let mut prefill = samples::gated(half, half, 4, [64, 3], 64, false);
    assert!(!found(&prefill).is_empty());
    prefill.phase = Phase::Prefill;
    assert!(found(&prefill).is_empty(), "rows of one sequence behind a product");
}

#[test]
fn buckets_of_one_tile_share_a_kernel() {
    let text = |rows| found(&samples::matmul(DType::BF16, DType::BF16, rows, 4096, 2048))[0].prelude();
    assert_eq!(text(5), text(8));
    assert_ne!(text(8), text(16));
}

#[test]
fn units_of_any_weight_have_as_many_bytes() {
    let of = |x, w| plain(&samples::residual(x, w, 1, 2048, 4096))[0].clone();
    let (half, mixed, whole) = (of(DType::BF16, DType::BF16), of(DType::F32, DType::F16), of(DType::F32, DType::F32));
    assert_eq!([&half, &mixed].map(|found| found.config.as_str()), ["warps=8 slots=2 chunk=2048 blocks=256"; 2]);
    assert_eq!(whole.config, "warps=8 slots=2 chunk=1024 blocks=256");
    // Rows of x are in f32, one after the other; a step of a warp has 256 bytes of each row of the weight.
    let has = |found: &Specialised, text: &str| assert!(found.prelude().contains(text), "{text}: {}", found.prelude());
    let texts = ["typedef float S;", "#define FMA 1", "SPAN = 128;", "PITCH = 4096;", "LINE = 4096;"];
    texts.into_iter().for_each(|text| has(&mixed, text));
    ["SPAN = 64;", "LINE = 4096;"].into_iter().for_each(|text| has(&whole, text));
    ["typedef bf16 S;", "#define FMA 0", "SPAN = 32;", "PITCH = 4128;"].into_iter().for_each(|text| has(&half, text));
    // As many rows of x as there are registers for.
    let columns = |sample: &Sample, count: u64| has(&found(sample)[0], &format!(" COLUMNS = {count};"));
    for (rows, count) in [(1, 1), (2, 2), (3, 4), (4, 4)] {
        columns(&samples::norm(DType::F32, DType::BF16, rows, 6144, 2048), count);
    }
    columns(&samples::grouped(DType::F32, DType::BF16, 64, 32, 2048, 1792), 8);
}

#[test]
fn packed_weights_are_read_in_spans_and_with_their_headers() {
    let half = DType::BF16;
    let of = |sample: &Sample| found(sample).into_iter().find(|one| one.config.contains("packed"));
    let has = |found: &Specialised, text: &str| assert!(found.prelude().contains(text), "{text}: {}", found.prelude());
    let first = of(&samples::norm(half, half, 1, 6144, 2048)).expect("a candidate");
    assert_eq!(first.config, "warps=8 slots=2 chunk=2048 blocks=256 packed");
    // 16 spans of 192 bytes, and 64 bytes more.
    ["#define PACKED 1", "#define WEIGHT packed", "SPAN = 128;", "LINE = 3136;", "const int* __restrict__ packed"]
        .into_iter()
        .for_each(|text| has(&first, text));
    assert_eq!(first.launch.args.iter().filter(|arg| matches!(arg, crate::plan::Arg::Packed(_))).count(), 1);
    // Fourteen spans: two for each of seven warps.
    let second = of(&samples::combine(half, half, 1, [32, 4], 2048, 1792)).expect("a candidate");
    assert_eq!(second.config, "warps=7 slots=2 chunk=1792 blocks=256 packed");
    // A chunk's last rows are an odd number of 64 bytes apart.
    let parts = of(&samples::residual(half, half, 1, 2048, 7168)).expect("a candidate");
    ["CHUNK = 1792;", "LINE = 2752;"].into_iter().for_each(|text| has(&parts, text));
    for (x, w, k) in [(half, half, 2112), (DType::F16, DType::F16, 2048), (DType::F32, DType::F32, 2048)] {
        assert!(of(&samples::norm(x, w, 1, 6144, k)).is_none(), "{x:?} {w:?} {k}");
    }
}

#[test]
fn rows_of_f32_meet_packed_weights_of_bf16() {
    let sample = samples::norm(DType::F32, DType::BF16, 2, 6144, 2048);
    let one = found(&sample).into_iter().find(|one| one.config.contains("packed")).expect("a candidate");
    let has = |text: &str| assert!(one.prelude().contains(text), "{text}: {}", one.prelude());
    // Rows of x one after the other in f32, columns of the weight in spans.
    let texts = ["typedef float S;", "typedef bf16 W;", "#define FMA 1", "#define PACKED 1", "SPAN = 128;"];
    texts.into_iter().chain(["PITCH = 2048;", "LINE = 3136;", " COLUMNS = 2;"]).for_each(has);
}

#[test]
fn a_unit_is_held_where_weights_are_known_before_the_wait() {
    let half = DType::BF16;
    let held = |sample: &Sample| -> Vec<Specialised> {
        found(sample).into_iter().filter(|one| one.config.contains(" held")).collect()
    };
    let dense = held(&samples::gated(half, half, 1, [2048, 3], 2048, false));
    assert_eq!(dense[0].config, "warps=8 slots=2 chunk=2048 blocks=256 packed held");
    assert!(dense[0].prelude().contains("#define HELD 1") && dense[0].prelude().contains("RESTAGES = 0;"));
    assert!(!held(&samples::combine(half, half, 1, [32, 4], 2048, 1792)).is_empty());
    // Who claims has one item more for sure, so that the unit that follows the held one is known too.
    let claims = held(&samples::norm(half, half, 1, 65536, 2048)).into_iter().find(|one| one.config.contains("claims"));
    let claims = claims.expect("a candidate");
    assert!(claims.prelude().contains("SLOTS = 2;") && claims.prelude().contains("OWN = 3;"), "{}", claims.config);
    // The router of these rows runs right before.
    assert!(held(&samples::pairs(half, half, 1, [32, 4], 3584, 2048)).is_empty());
    assert!(
        held(&samples::grouped(half, half, 64, 32, 2048, 1792))
            .iter()
            .all(|one| one.prelude().contains("RESTAGES = 1;"))
    );
}

#[test]
fn candidates_differ_and_fit() {
    for sample in samples::all(DType::BF16, DType::BF16).into_iter().chain(samples::all(DType::F32, DType::F32)) {
        let candidates = found(&sample);
        assert!(candidates.len() <= 80, "{}: {}", sample.name, candidates.len());
        for (i, one) in candidates.iter().enumerate() {
            assert!(one.launch.shared <= 231_936 && one.launch.cluster == 1, "{}", sample.name);
            assert!(candidates[..i].iter().all(|other| other.config != one.config), "{}", one.config);
        }
    }
}

#[test]
fn work_is_divided_evenly() {
    let half = DType::BF16;
    let of = |sample: &Sample, config: &str| {
        let candidates = found(sample);
        let one = candidates.iter().find(|one| one.config == config);
        let launch = &one.unwrap_or_else(|| panic!("{config}: {}", candidates[0].config)).launch;
        (launch.grid[0], launch.shared)
    };
    // A tile for each block, of which six fit on an SM.
    let (blocks, shared) = of(&samples::residual(half, half, 1, 2048, 2048), "warps=8 slots=1 chunk=2048 blocks=256");
    assert!(blocks == 256 && shared < 38 << 10);
    of(&samples::norm(half, half, 1, 6144, 2048), "warps=8 slots=2 chunk=2048 blocks=256");
    // An item is three tiles.
    let (blocks, shared) =
        of(&samples::gated(half, half, 1, [2048, 3], 2048, false), "warps=8 slots=2 chunk=2048 blocks=256");
    assert!(blocks == 256 && shared < 74 << 10);
    of(&samples::norm(half, half, 1, 3072, 2048), "warps=8 slots=3 chunk=2048 blocks=128");
    of(&samples::pairs(half, half, 1, [32, 4], 3584, 2048), "warps=8 slots=2 chunk=2048 blocks=256");
    of(&samples::combine(half, half, 1, [32, 4], 2048, 1792), "warps=8 slots=2 chunk=1792 blocks=256");
    of(&samples::combine(half, half, 1, [32, 4], 2048, 1792), "warps=4 slots=4 chunk=896 blocks=256");
    of(&samples::residual(half, half, 1, 2048, 7168), "warps=8 slots=2 chunk=1792 blocks=256");
}

#[test]
fn blocks_claim_what_is_not_theirs_for_sure() {
    let half = DType::BF16;
    let claiming = |sample: &Sample| -> Vec<Specialised> {
        plain(sample).into_iter().filter(|one| one.config.ends_with(" claims")).collect()
    };
    let experts = claiming(&samples::pairs(half, half, 1, [32, 4], 3584, 2048));
    let first = &experts[0];
    assert_eq!((first.config.as_str(), first.launch.grid[0]), ("warps=8 slots=2 chunk=2048 blocks=264 claims", 264));
    assert!(first.prelude().contains("OWN = 2"), "{}", first.prelude());
    assert_eq!(first.launch.args.iter().filter(|arg| matches!(arg, crate::plan::Arg::Claim(_))).count(), 1);
    // Fewer blocks, so that something is left to claim.
    assert_eq!(claiming(&samples::norm(half, half, 1, 6144, 2048))[0].launch.grid[0], 256);
    // An item for each block; and items of different rows.
    assert!(claiming(&samples::combine(half, half, 1, [32, 4], 2048, 1792)).is_empty());
    assert!(claiming(&samples::pairs(half, half, 4, [32, 4], 3584, 2048)).is_empty());
}

/// Writes every candidate's text for the compiler: `KERNEL_TEXTS=DIR cargo test --lib ring`.
#[test]
fn texts() {
    let Some(folder) = std::env::var_os("KERNEL_TEXTS") else { return };
    samples::write(&[&Ring], folder.as_ref());
}
