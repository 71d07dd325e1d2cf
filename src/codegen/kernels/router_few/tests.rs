use super::super::router::testing::{BF16, DECODE, FULL, Form, PLAIN, lfm2, router};
use super::super::trial::{candidates, write_text};
use super::*;
use crate::plan::Semantic;

const ALONE: Form = Form { group: false, ..DECODE };

fn configs(semantic: &Semantic) -> Vec<String> {
    candidates(&RouterFew, semantic).into_iter().map(|found| found.config).collect()
}

#[test]
fn every_form_has_a_candidate() {
    for bits in 0..32u32 {
        let on = |bit: u32| bits & (1 << bit) != 0;
        let form = Form { norm: on(0), bias: on(1), divide: on(2), factor: on(3), group: on(4) };
        for rows in 1..=8 {
            let found = candidates(&RouterFew, &lfm2(rows, form));
            assert!(!found.is_empty(), "{bits:b} {rows}");
            for found in found {
                assert_eq!(found.launch.grid[0] % found.launch.cluster, 0);
                assert!(!form.group || found.launch.grid[0] == found.launch.cluster, "one cluster sorts");
            }
        }
    }
}

#[test]
fn rows_are_divided_among_clusters() {
    assert_eq!(
        configs(&lfm2(1, ALONE)),
        [
            "cluster=8 rows=1 warps=8",
            "cluster=8 rows=1 warps=4",
            "cluster=4 rows=1 warps=8",
            "cluster=4 rows=1 warps=4"
        ]
    );
    let first = |rows, form| candidates(&RouterFew, &lfm2(rows, form)).remove(0);
    assert_eq!(first(8, ALONE).launch.grid, [64, 1, 1]);
    assert_eq!((&*first(32, ALONE).config, first(32, ALONE).launch.grid), ("cluster=8 rows=2 warps=8", [128, 1, 1]));
    for (rows, tile) in [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)] {
        assert_eq!(first(rows, DECODE).config, format!("cluster=8 rows={tile} warps=8"));
    }
    assert_eq!(first(3, DECODE).prelude(), first(4, DECODE).prelude(), "rows do not occur in the text");
}

#[test]
fn texts_to_compile() {
    for rows in [1, 2, 4, 8] {
        write_text(&RouterFew, &lfm2(rows, ALONE), 0, &format!("alone-{rows}"));
        write_text(&RouterFew, &lfm2(rows, DECODE), 0, &format!("decode-{rows}"));
    }
    let last = |rows, form| candidates(&RouterFew, &lfm2(rows, form)).len() - 1;
    write_text(&RouterFew, &lfm2(1, ALONE), last(1, ALONE), "alone-last");
    write_text(&RouterFew, &lfm2(7, ALONE), last(7, ALONE), "alone-7-last");
    write_text(&RouterFew, &lfm2(6, FULL), last(6, FULL), "full-last");
    write_text(&RouterFew, &router([7, 128, 8, 2], [DType::F32; 2], FULL), 0, "f32");
    write_text(&RouterFew, &router([4, 2048, 32, 4], [DType::F32; 2], FULL), 0, "f32-4");
    write_text(&RouterFew, &router([3, 264, 5, 5], [DType::F16; 2], FULL), 0, "odd-f16");
    write_text(&RouterFew, &router([8, 88, 70, 32], [DType::F16, DType::F32], PLAIN), 0, "wide");
    write_text(&RouterFew, &router([2, 264, 100, 7], BF16, Form { group: true, ..PLAIN }), 0, "wide-sorted");
    write_text(&RouterFew, &router([1, 8, 1, 1], BF16, FULL), 0, "smallest");
}

#[test]
fn what_does_not_fit_has_no_candidate() {
    assert!(configs(&lfm2(9, FULL)).is_empty(), "one cluster has few rows");
    assert!(!configs(&lfm2(64, PLAIN)).is_empty());
    assert!(configs(&lfm2(512, PLAIN)).is_empty(), "many rows");
    assert!(configs(&router([1, 2044, 32, 4], BF16, PLAIN)).is_empty(), "vectors of eight");
    assert!(configs(&router([1, 64, 64, 33], BF16, PLAIN)).is_empty(), "33 choices");
    assert!(configs(&router([1, 7168, 256, 8], BF16, PLAIN)).is_empty(), "too many gates for registers");
}
