//! Which steps match, what is specialised to, and texts to compile by hand.

use super::super::tiles::testing::{After, semantic, typed, write};
use super::*;
use crate::plan::{Arg, Op, Phase, Semantic, Slot, TensorMap};

const GATHER: Op = Op::GroupedMatmulGather { k: 4 };

fn of(semantic: &Semantic) -> Vec<Specialised> {
    WHOLE.candidates(&Problem { semantic, phase: Phase::Prefill })
}

fn split(semantic: &Semantic) -> Vec<Specialised> {
    SPLIT.candidates(&Problem { semantic, phase: Phase::Prefill })
}

/// Types of x, w and y that are multiplied as sums of terms.
const TERMS: [DType; 3] = [DType::F32, DType::BF16, DType::F32];

#[test]
fn products_of_one_16_bit_type_match_in_each_form_with_each_epilogue() {
    for op in [Op::Matmul, GATHER, Op::GroupedMatmul] {
        for ty in [DType::BF16, DType::F16] {
            for after in [After::Nothing, After::Residual, After::Swiglu(Some(8))] {
                let (few, many) =
                    (semantic(op.clone(), ty, 3, 8, 16, after), semantic(op.clone(), ty, 2048, 64, 512, after));
                assert!(!of(&few).is_empty(), "{op:?} {ty:?} {after:?}");
                assert_eq!(of(&many).len(), MOST_CANDIDATES, "{op:?} {ty:?} {after:?}");
            }
        }
    }
    assert!(!of(&typed(Op::Matmul, [DType::BF16, DType::BF16, DType::F32], 3, 8, 8, After::Nothing)).is_empty());
}

#[test]
fn other_types_sizes_and_wires_do_not_match() {
    let bf16 = |k, n, after| semantic(Op::Matmul, DType::BF16, 24, k, n, after);
    let mut swapped = bf16(64, 64, After::Swiglu(Some(8)));
    swapped.body[1].1 = vec![Slot::Temp(1)];
    let mut gathered = semantic(GATHER, DType::BF16, 24, 64, 48, After::Nothing);
    gathered.body[0].1.swap(2, 3);
    let none = [
        semantic(Op::Matmul, DType::F32, 24, 64, 48, After::Nothing),
        typed(Op::Matmul, [DType::BF16, DType::F16, DType::BF16], 24, 64, 48, After::Nothing),
        semantic(Op::ExpertMatmul, DType::BF16, 24, 64, 48, After::Nothing),
        bf16(60, 48, After::Nothing),
        bf16(64, 44, After::Nothing),
        bf16(64, 64, After::Swiglu(Some(16))),
        bf16(64, 64, After::Swiglu(None)),
        swapped,
        gathered,
    ];
    none.iter().for_each(|semantic| assert_eq!(of(semantic), [], "{semantic:?}"));
}

#[test]
fn rows_do_not_occur_in_the_text_so_that_buckets_share_a_kernel() {
    for op in [Op::Matmul, GATHER] {
        let texts = |rows| {
            let found = of(&semantic(op.clone(), DType::BF16, rows, 2048, 3584, After::Swiglu(Some(8))));
            found.into_iter().map(|found| (found.config.clone(), found.prelude())).collect::<Vec<_>>()
        };
        let (some, more) = (texts(8192), texts(6000));
        assert!(some.iter().any(|text| more.contains(text)), "{op:?}");
    }
}

#[test]
fn maps_are_of_the_weight_and_of_rows_that_are_not_gathered() {
    let maps = |op: Op| -> Vec<TensorMap> {
        let found = of(&semantic(op, DType::BF16, 300, 264, 48, After::Nothing)).remove(0);
        let args = found.launch.args.into_iter();
        args.filter_map(|arg| if let Arg::Map(map) = arg { Some(map) } else { None }).collect()
    };
    let grouped = maps(Op::GroupedMatmul);
    assert_eq!(grouped.iter().map(|map| map.read).collect::<Vec<_>>(), [1, 0]);
    assert_eq!((grouped[0].sizes, grouped[0].strides), ([264, 48, 5], [528, 528 * 48]));
    assert_eq!((grouped[1].sizes, grouped[1].strides), ([264, 300, 1], [528, 528 * 300]));
    assert_eq!(maps(GATHER).iter().map(|map| map.read).collect::<Vec<_>>(), [1]);
}

#[test]
fn rows_of_f32_match_in_each_form_where_the_weight_is_of_bf16() {
    for op in [Op::Matmul, GATHER, Op::GroupedMatmul] {
        for after in [After::Nothing, After::Residual, After::Swiglu(Some(8))] {
            let found = split(&typed(op.clone(), TERMS, 300, 264, 272, after));
            assert!(found.len() >= 4, "{op:?} {after:?}");
            for found in found {
                assert!(found.config.starts_with("terms=3 "), "{}", found.config);
                let maps = found.launch.args.iter().filter(|arg| matches!(arg, Arg::Map(_))).count();
                assert_eq!(maps, 1, "rows are taken apart on their way, so no boxes of them");
            }
            assert_eq!(of(&typed(op.clone(), TERMS, 300, 264, 272, after)), []);
        }
    }
    let of_types = |types| split(&typed(Op::Matmul, types, 300, 264, 272, After::Nothing));
    let (f32, bf16, f16) = (DType::F32, DType::BF16, DType::F16);
    assert!(!of_types([f32, bf16, bf16]).is_empty());
    for types in [[f32, f16, f32], [f32, f32, f32], [bf16, bf16, f32], [f16, bf16, f32]] {
        assert_eq!(of_types(types), [], "{types:?}");
    }
    for (op, rows, k) in [(Op::ExpertMatmul, 300, 264), (Op::Matmul, 300, 260), (Op::Matmul, FEW_ROWS, 264)] {
        assert_eq!(split(&typed(op.clone(), TERMS, rows, k, 272, After::Nothing)), [], "{op:?} {rows} {k}");
    }
}

#[test]
fn blocks_on_a_multiprocessor_have_room_and_large_products_large_tiles() {
    let check = |twin: &Wgmma, semantic: &Semantic, y: DType| {
        let problem = Problem { semantic, phase: Phase::Prefill };
        let product = twin.matched(&problem).expect("a product");
        for shape in twin.shapes {
            let Some((stages, piece, shared)) = shape.memory(&product, y.bytes()) else {
                assert!(y == DType::F32 && shape.apart, "{shape:?}");
                continue;
            };
            assert!((shared + SYSTEM_SHARED) * shape.resident <= ALL_SHARED && shared <= MOST_SHARED);
            assert!(stages >= FEWEST_STAGES && shape.rows % piece == 0 && piece % 16 == 0);
            assert!(shape.rows % shape.box_rows() == 0 && shape.box_rows() % 8 == 0 && shape.box_rows() <= BOX);
            let first = 65_536 / (shape.threads() * shape.resident) / 8 * 8;
            let registers = [true, false].into_iter().filter_map(|gathers| shape.registers(gathers));
            for (copy, multiply) in registers {
                assert!((copy + multiply * shape.groups) * 128 <= first * shape.threads(), "{shape:?}");
            }
        }
        twin.candidates(&problem).remove(0).config
    };
    for after in [After::Nothing, After::Residual, After::Swiglu(Some(8))] {
        for (ty, y) in [(DType::BF16, DType::BF16), (DType::F16, DType::F32)] {
            let first = check(&WHOLE, &typed(Op::Matmul, [ty, ty, y], 8192, 2048, 6144, after), y);
            let large = ["tile=256x192", "tile=256x128", "tile=192x192", "tile=128x256"];
            assert!(large.iter().any(|tile| first.starts_with(tile)), "{first}");
        }
        let first = check(&SPLIT, &typed(Op::Matmul, TERMS, 8192, 2048, 6144, after), DType::F32);
        assert!(first.starts_with("terms=3 tile=256x64 "), "{first}");
    }
}

/// A kernel's text, with its launch at the end.
fn write_all(name: &str, text: String, found: &Specialised) {
    write(name, &format!("{text}// {} {:?}\n", found.config, found.launch));
}

/// With `KERNELS_OUT=folder cargo test --lib codegen::kernels::wgmma::tests::texts`, writes kernels to compile.
#[test]
fn texts() {
    let cases = [
        (Op::Matmul, 8192, 2048, 6144, After::Nothing, DType::BF16),
        (Op::Matmul, 100, 2048, 2048, After::Residual, DType::F16),
        (Op::Matmul, 16, 264, 72, After::Nothing, DType::BF16),
        (GATHER, 2048, 2048, 3584, After::Swiglu(Some(8)), DType::BF16),
        (Op::GroupedMatmul, 8192, 1792, 2048, After::Residual, DType::BF16),
        (Op::Matmul, 150, 200, 272, After::Swiglu(Some(8)), DType::F16),
        (GATHER, 37, 200, 272, After::Swiglu(Some(8)), DType::BF16),
    ];
    let mut cases: Vec<_> = cases.map(|(op, rows, k, n, after, ty)| semantic(op, ty, rows, k, n, after)).into();
    let types = [DType::BF16, DType::BF16, DType::F32];
    cases.push(typed(Op::Matmul, types, 512, 2048, 2048, After::Nothing));
    cases.push(typed(Op::Matmul, types, 512, 2048, 2048, After::Residual));
    for (case, semantic) in cases.iter().enumerate() {
        let problem = Problem { semantic, phase: Phase::Prefill };
        write_shapes(&WHOLE, &case.to_string(), &problem);
    }
}

/// A kernel of each shape.
fn write_shapes(twin: &Wgmma, case: &str, problem: &Problem) {
    let product = twin.matched(problem).expect("a product");
    for (i, shape) in twin.shapes.iter().enumerate() {
        let Some(found) = shape.specialise(problem, &product) else { continue };
        write_all(&format!("wgmma.{case}.{i}"), format!("{}\n{}", found.prelude(), twin.source()), &found);
    }
}

/// The same of rows of f32.
#[test]
fn texts_of_terms() {
    let cases = [
        (Op::Matmul, 8192, 2048, 6144, After::Nothing),
        (Op::Matmul, 100, 2048, 2048, After::Residual),
        (Op::Matmul, 16, 264, 72, After::Nothing),
        (GATHER, 2048, 2048, 3584, After::Swiglu(Some(8))),
        (Op::GroupedMatmul, 8192, 1792, 2048, After::Residual),
        (Op::Matmul, 150, 200, 272, After::Swiglu(Some(8))),
        (GATHER, 37, 200, 272, After::Swiglu(Some(8))),
    ];
    for (case, (op, rows, k, n, after)) in cases.into_iter().enumerate() {
        let semantic = typed(op, TERMS, rows, k, n, after);
        write_shapes(&SPLIT, &format!("terms.{case}"), &Problem { semantic: &semantic, phase: Phase::Prefill });
    }
}

/// Products as a large model has them, of 16 bits beside those of `tile`, of f32 beside those of `tile_fma`: to measure.
#[test]
fn texts_to_measure() {
    let experts = 32;
    let of_model = |op: Op, types, rows: u64, k, n, after| {
        let mut semantic = typed(op, types, rows, k, n, after);
        if let [_, w, rest @ ..] = &mut semantic.inputs[..]
            && w.1.len() == 3
        {
            w.1[0] = experts;
            rest.iter_mut().filter(|ty| ty.1 == [6]).for_each(|ty| ty.1 = vec![experts + 1]);
        }
        semantic
    };
    let rows = [64, 128, 256, 512, 2048, 8192];
    for (kind, op, each, k, n, after) in [
        ("up", GATHER, 1, 2048, 3584, After::Swiglu(Some(8))),
        ("down", Op::GroupedMatmul, 4, 1792, 2048, After::Nothing),
        ("in", Op::Matmul, 1, 2048, 6144, After::Nothing),
        ("out", Op::Matmul, 1, 2048, 2048, After::Residual),
        ("ffn", Op::Matmul, 1, 2048, 14336, After::Swiglu(Some(8))),
        ("back", Op::Matmul, 1, 7168, 2048, After::Residual),
    ] {
        for rows in rows {
            let of_bf16: [&dyn Twin; 2] = [&WHOLE, &super::super::tile::Tile];
            let of_f32: [&dyn Twin; 2] = [&SPLIT, &super::super::tile_fma::TileFma];
            for (label, types, twins) in [("measure", [DType::BF16; 3], of_bf16), ("terms", TERMS, of_f32)] {
                let semantic = of_model(op.clone(), types, rows * each, k, n, after);
                let problem = Problem { semantic: &semantic, phase: Phase::Prefill };
                for (twin, most) in twins.into_iter().zip([8, 2]) {
                    for (i, found) in twin.candidates(&problem).into_iter().take(most).enumerate() {
                        let text = format!("{}\n{}", found.prelude(), twin.source());
                        write_all(&format!("{label}.{kind}.{rows}.{}.{i}", twin.name()), text, &found);
                    }
                }
            }
        }
    }
}
