//! Which steps match, what is specialised to, and texts to compile by hand.

use super::*;
use crate::codegen::kernels::heads::testing::{decode, problem, sizes};
use crate::codegen::kernels::testing::dump;
use crate::plan::{Arg, DType, Semantic};

fn of(semantic: &Semantic) -> Vec<Specialised> {
    Flash.candidates(&problem(semantic))
}

fn configs(semantic: &Semantic) -> Vec<String> {
    of(semantic).into_iter().map(|found| found.config).collect()
}

#[test]
fn larger_tiles_where_rows_are_many() {
    assert_eq!(configs(&sizes(DType::BF16).rows(64).attention())[0], "groups=1 keys=64 blocks=3");
    assert_eq!(configs(&sizes(DType::F16).rows(8192).attention())[0], "groups=3 keys=128 blocks=1");
    assert_eq!(configs(&sizes(DType::F16).rows(8192).attention()).len(), 5);
}

#[test]
fn nothing_that_it_does_not_compute() {
    assert!(configs(&sizes(DType::F32).attention()).is_empty());
    assert!(configs(&sizes(DType::BF16).head(32).attention()).is_empty());
    assert!(configs(&sizes(DType::BF16).head(128).attention()).is_empty());
    assert!(configs(&sizes(DType::BF16).fused()).is_empty());
    assert!(Flash.candidates(&decode(&sizes(DType::BF16).attention())).is_empty());
    let mut mixed = sizes(DType::BF16).attention();
    mixed.inputs[1].0 = DType::F16;
    assert!(configs(&mixed).is_empty(), "queries and cache of different types");
    let mut wired = sizes(DType::BF16).attention();
    wired.body[0].1.swap(1, 2);
    assert!(configs(&wired).is_empty(), "block table as cache");
    let with_page = |page: u64| {
        let mut semantic = sizes(DType::BF16).attention();
        semantic.inputs[1].1[3] = page;
        configs(&semantic).len()
    };
    assert_eq!([8, 16, 32, 64, 128, 256].map(with_page), [5; 6]);
    assert_eq!([4, 24, 48, 96].map(with_page), [0; 4], "pages that tiles do not divide, or the other way around");
    assert_eq!(with_page(192), 2, "pages of three times 64 positions");
}

#[test]
fn one_text_for_all_rows_of_a_size_of_tile() {
    let text = |rows| of(&sizes(DType::BF16).rows(rows).attention())[0].prelude();
    assert_eq!(text(1), text(64));
    assert_eq!(text(4096), text(8192));
}

#[test]
fn the_map_is_of_all_rows_of_the_cache() {
    for found in of(&sizes(DType::BF16).rows(300).attention()) {
        let map = found.launch.args.iter().find_map(|arg| if let Arg::Map(map) = arg { Some(*map) } else { None });
        let map = map.expect("a map");
        assert_eq!((map.read, map.sizes, map.tile), (1, [64, 2048 * 2 * 8 * 64, 1], [64, 64, 1]));
        assert_eq!(map.strides, [128, 128 * 2048 * 2 * 8 * 64]);
    }
}

#[test]
fn blocks_on_a_multiprocessor_have_room() {
    for heads in [8, 24, 32, 64, 128, 256] {
        for rows in [1, 100, 8192] {
            let semantic = sizes(DType::BF16).rows(rows).heads(heads).attention();
            assert_eq!(configs(&semantic).len(), 5, "{heads} heads");
            for found in of(&semantic) {
                assert!(u64::from(found.launch.shared) <= MOST_SHARED, "{}", found.config);
                assert!(found.launch.grid[0] as u64 >= heads * rows / (4 * LINES), "{}", found.config);
            }
        }
    }
}

#[test]
fn texts_for_a_compiler() {
    for dtype in [DType::BF16, DType::F16] {
        dump(&Flash, &sizes(dtype).rows(8192).attention(), Phase::Prefill);
    }
    dump(&Flash, &sizes(DType::BF16).rows(64).heads(8).attention(), Phase::Prefill);
    dump(&Flash, &sizes(DType::BF16).rows(64).heads(24).attention(), Phase::Prefill);
    for page in [8, 192, 256] {
        let mut semantic = sizes(DType::BF16).rows(64).attention();
        semantic.inputs[1].1[3] = page;
        semantic.outputs[0].0 = DType::F32;
        dump(&Flash, &semantic, Phase::Prefill);
    }
}
