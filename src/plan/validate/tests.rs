//! Each rule, broken on its own in a plan that holds: the fault has to name it.

use super::*;
use crate::plan::{
    Bucket, Buffer, Collective, CollectiveKind, DType, Expr, Instr, Layout, Op, Packed, PlanFile, Ref, Region, Slot,
    StateRole, Step, TensorSource, TensorType,
};

fn small() -> Manifest {
    PlanFile::parse_manifest(include_str!("../../../tests/data/small_manifest.ron")).expect("the fixture is a manifest")
}

/// The fixture's step of a name, in its first bucket.
fn step<'a>(manifest: &'a mut Manifest, name: &str) -> &'a mut Step {
    let steps = &mut manifest.ranks[0].buckets[0].steps;
    steps.iter_mut().find(|step| step.name == name).expect("a step of the fixture")
}

/// The body of a step's semantic.
fn body<'a>(manifest: &'a mut Manifest, name: &str) -> &'a mut Vec<Instr> {
    let op = step(manifest, name).op as usize;
    &mut manifest.ranks[0].semantics[op].body
}

type Change = fn(&mut Manifest);

fn check(changes: &[(&str, Change)]) {
    for (expected, change) in changes {
        let mut manifest = small();
        change(&mut manifest);
        let faults = validate(&manifest, 1, 0).expect_err(expected);
        let text: Vec<String> = faults.iter().map(ToString::to_string).collect();
        assert!(text.iter().any(|fault| fault.contains(expected)), "expected `{expected}`, found {text:#?}");
    }
}

#[test]
fn the_fixture_holds() {
    assert_eq!(validate(&small(), 1, 0), Ok(()));
}

#[test]
fn model_limits_and_tensors() {
    check(&[
        ("ranks: expected at least one", |m| m.ranks.clear()),
        ("`vocab`: expected 1", |m| m.model.vocab = 0),
        ("`prompt`: expected tokens below 16, found 16", |m| m.model.prompt = vec![3, 16]),
        ("`config_hash`: expected 64", |m| m.model.config_hash = "g".repeat(64)),
        ("`page_tokens`: expected 1", |m| m.limits.page_tokens = 0),
        ("`kv_tokens`: expected whole pages of 4, found 17", |m| m.limits.kv_tokens = 17),
        ("`max_context`: expected 1 to 2147483648", |m| m.limits.max_context = 1 << 40),
        ("tensors: `norm` is there more than once", |m| m.tensors[0].name = "norm".into()),
        ("tensor q: expected at least one source", |m| m.tensors[2].sources.clear()),
        ("the part from 9 of 16 in `experts.gate_up`", |m| {
            m.tensors[7].sources[1] = TensorSource::Part { name: "experts.gate_up".into(), start: 9, of: 16 };
        }),
        ("expected one `{}` in the source `experts.w1`", |m| {
            m.tensors[7].sources[0] = TensorSource::PerIndex("experts.w1".into());
        }),
        ("tensor q: expected dimensions from 1", |m| m.tensors[2].shape[0] = 0),
        ("tensor q: `synthetic`: expected finite", |m| m.tensors[2].synthetic.scale = f32::NAN),
    ]);
}

#[test]
fn pool() {
    check(&[
        ("region `state`: expected an offset from", |m| m.ranks[0].pool.state.offset -= ALIGN),
        ("region `arena`: expected an offset aligned", |m| m.ranks[0].pool.arena.offset += 8),
        ("region `io`: expected an end up to", |m| m.ranks[0].pool.io = Region { offset: 1 << 20, bytes: u64::MAX }),
        ("weights `qkv`: expected an offset from", |m| m.ranks[0].weights[2].offset = 0),
        ("weights `experts.w1`: expected a place inside of", |m| m.ranks[0].weights[5].offset += 1 << 20),
        ("weights `norm`: expected an offset aligned", |m| m.ranks[0].weights[1].offset += 4),
        ("weight qkv: `v` [8, 8] is no part of [24, 8] along axis 1", |m| {
            m.ranks[0].weights[2].layout = Layout::Concat { axis: 1, block: None, tensors: vec![4, 3, 2] };
        }),
        ("weight qkv: axis 0: expected parts that add up to 24, found 16", |m| {
            m.ranks[0].weights[2].layout = Layout::Concat { axis: 0, block: None, tensors: vec![2, 3] };
        }),
        ("weight qkv: blocks of 3 need parts", |m| {
            m.ranks[0].weights[2].layout = Layout::Concat { axis: 0, block: Some(3), tensors: vec![2, 3, 4] };
        }),
        ("weight qkv: expected one of 8 tensors, found 8", |m| {
            m.ranks[0].weights[2].layout = Layout::Concat { axis: 0, block: None, tensors: vec![2, 3, 8] };
        }),
        ("weight norm: expected the shape of `q`", |m| m.ranks[0].weights[1].layout = Layout::Copy(2)),
        ("state kv.0: KvPages: expected a float type [4,2,_,4,_]", |m| m.ranks[0].states[0].ty.1[0] = 3),
        ("state kv.0: BlockTable: expected i32 [2,2]", |m| m.ranks[0].states[0].role = StateRole::BlockTable),
        ("states: expected at most one Sampling, found 2", |m| {
            let mut second = m.ranks[0].states[3].clone();
            second.name = "more".into();
            m.ranks[0].states.push(second);
        }),
        ("io `tokens`: expected an offset from 16 on, behind `pos`", |m| m.ranks[0].io[1].offset = 0),
        ("io: expected the input `rows`", |m| m.ranks[0].io[3].name = "lines".into()),
        ("io `slot`: expected an input", |m| m.ranks[0].io[2].input = false),
    ]);
}

#[test]
fn packed_forms() {
    // The second weight, and the last, of bf16 with rows of a span.
    fn packable(m: &mut Manifest) -> u64 {
        let program = &mut m.ranks[0];
        let end = program.pool.weights.bytes;
        for id in [1, 5] {
            let ty = TensorType(DType::BF16, vec![2, 128]);
            program.weights[id].ty = ty.clone();
            m.tensors[0].shape.clone_from(&ty.1);
            program.weights[id].layout = Layout::Copy(0);
            program.weights[id].indices.clear();
            program.weights[id].offset = end + if id == 5 { 512 } else { 0 };
        }
        program.packed = vec![Packed { weight: 1, offset: end + 1024 }, Packed { weight: 5, offset: end + 1536 }];
        program.pool.weights.bytes += 1024 + 1024;
        for region in [&mut program.pool.state, &mut program.pool.arena, &mut program.pool.io] {
            region.offset += 2048;
        }
        end
    }
    fn faults(change: impl FnOnce(&mut Manifest, u64)) -> Vec<String> {
        let mut manifest = small();
        let end = packable(&mut manifest);
        change(&mut manifest, end);
        let mut faults = Faults::default();
        pool::check(&manifest, &manifest.ranks[0], true, "rank 0", &mut faults);
        // Tensors are shared: other weights that are made of the first are no matter here.
        let of_forms = faults.0.iter().map(ToString::to_string).filter(|text| !text.contains("the shape of"));
        of_forms.collect()
    }
    assert_eq!(faults(|_, _| ()), Vec::<String>::new());
    type Change = fn(&mut Manifest, u64);
    let cases: [(&str, Change); 7] = [
        ("packed form of weight 1: expected packed forms by ascending weight", |m, _| m.ranks[0].packed.swap(0, 1)),
        ("packed form of weight 5: expected packed forms by ascending weight", |m, _| m.ranks[0].packed[0].weight = 5),
        ("packed form of weight 99: expected one of 6 weights", |m, _| m.ranks[0].packed[1].weight = 99),
        (
            "packed form of weight 2: expected bf16 with two axes or more, of which the last is a multiple of 128",
            |m, _| {
                m.ranks[0].packed[1].weight = 2;
            },
        ),
        ("packed form of weight 1: expected an offset from", |m, end| m.ranks[0].packed[0].offset = end),
        ("behind `norm`, found", |m, end| m.ranks[0].packed[1].offset = end + 1024 + ALIGN),
        ("expected a place inside of", |m, _| m.ranks[0].packed[1].offset += ALIGN),
    ];
    for (expected, change) in cases {
        let found = faults(change);
        assert!(found.iter().any(|fault| fault.contains(expected)), "expected `{expected}`, found {found:#?}");
    }
}

const ALIGN: u64 = crate::plan::ALIGNMENT;

#[test]
fn semantics() {
    check(&[
        ("Temp(0) is read before it is written", |m| body(m, "layers.0.attn.norm+matmul").swap(0, 1)),
        ("Out(0) is written twice", |m| {
            let body = body(m, "layers.0.residual");
            body.push(body[0].clone());
        }),
        ("Out(0) is never written", |m| {
            body(m, "layers.0.attn.norm+matmul").pop();
        }),
        ("In(9): expected one of", |m| body(m, "embed")[0].1[0] = Slot::In(9)),
        ("In(0) is written", |m| body(m, "embed")[0].2[0] = Slot::In(0)),
        ("Embed: expected 2 arguments, found 1", |m| {
            body(m, "embed")[0].1.pop();
        }),
        ("Embed: expected i32, found f32[16,8]", |m| body(m, "embed")[0].1.swap(0, 1)),
        ("Matmul: inner dimension: expected 8, found 7", |m| {
            let op = step(m, "layers.1.router").op as usize;
            m.ranks[0].semantics[op].inputs[1].1[1] = 7;
        }),
        ("Matmul: the result: expected shape [4, 4], found f32[4,5]", |m| {
            let op = step(m, "layers.1.router").op as usize;
            m.ranks[0].semantics[op].outputs[0].1[1] = 5;
        }),
        ("register 2: expected earlier registers and 2 arguments, found Arg(2)", |m| {
            body(m, "layers.0.residual")[0].0 = Op::Pointwise(vec![Expr::Const(1.0), Expr::Arg(1), Expr::Arg(2)]);
        }),
        ("register 0: expected earlier registers", |m| {
            body(m, "layers.0.residual")[0].0 = Op::Pointwise(vec![Expr::Round(0, DType::BF16)]);
        }),
        ("Rope: expected an even `head_dim` that divides 8, found 3", |m| {
            body(m, "layers.0.attn.headrope+kvwrite")[0].0 = Op::Rope { theta: 1e4, head_dim: 3 };
        }),
        ("Attention: `scale` cannot be NaN", |m| {
            body(m, "layers.0.attn.attention")[0].0 = Op::Attention { heads: 1, scale: f64::NAN };
        }),
        ("number of pairs: expected 12, found 8", |m| {
            body(m, "layers.1.expert")[0].0 = Op::GroupedMatmulGather { k: 3 };
        }),
        ("number of pairs: expected 12, found 8", |m| {
            let first = &mut body(m, "layers.1.expert")[0];
            (first.0, first.1) = (Op::GatherPairs { k: 3 }, vec![first.1[0], first.1[2]]);
        }),
        ("In(3) is used as Position below 8 and as Slot below 2", |m| {
            body(m, "layers.0.attn.attention")[0].1[4] = Slot::In(3)
        }),
        ("expected at most", |m| {
            let op = step(m, "layers.1.conv").op as usize;
            m.ranks[0].semantics[op].temps[0] = TensorType(DType::F32, vec![1 << 20, 1 << 20]);
        }),
        ("Temp(0) is used as ConvRing, which has to be an input", |m| {
            let op = step(m, "layers.1.conv").op as usize;
            let semantic = &mut m.ranks[0].semantics[op];
            semantic.temps.push(TensorType(DType::F32, vec![2, 8, 8]));
            let copy = Instr(Op::Pointwise(vec![Expr::Arg(0)]), vec![Slot::In(2)], vec![Slot::Temp(1)]);
            semantic.body.insert(0, copy);
            semantic.body[1].1[2] = Slot::Temp(1);
            semantic.temps.swap(0, 1);
            semantic.body[0].2[0] = Slot::Temp(0);
            semantic.body[1].1[2] = Slot::Temp(0);
            semantic.body[1].2[0] = Slot::Temp(1);
            semantic.body[2].1[0] = Slot::Temp(1);
        }),
    ]);
}

#[test]
fn steps() {
    check(&[
        ("`op`: expected one of", |m| step(m, "embed").op = 99),
        ("expected 2 reads and 1 writes, found 1 and 1", |m| {
            step(m, "embed").reads.pop();
        }),
        ("read 0, Io(1): expected Token below 16, found Position below 8", |m| step(m, "embed").reads[0] = Ref::Io(1)),
        ("read 1, Weight(4): expected f32[8,3], found f32[4,8]", |m| {
            step(m, "layers.1.conv").reads[1] = Ref::Weight(4);
        }),
        ("read 3, State(3): expected a state for BlockTable", |m| {
            m.ranks[0].states[2].ty = TensorType(DType::I32, vec![2, 8]);
            m.limits.max_context = 32;
            let op = step(m, "layers.0.attn.headrope+kvwrite").op as usize;
            m.ranks[0].semantics[op].inputs[3].1[1] = 8;
            step(m, "layers.0.attn.headrope+kvwrite").reads[3] = Ref::State(3);
        }),
        ("expected the arena or io", |m| step(m, "embed").writes[0] = Ref::Weight(0)),
        ("expected a result, found an input", |m| step(m, "head.sample").writes[0] = Ref::Io(0)),
        ("step 0 writes it too", |m| step(m, "layers.0.residual").writes[0] = Ref::Arena(0)),
        ("buffer more: no step writes it", |m| {
            m.ranks[0].buckets[0].buffers.push(Buffer("more".into(), 0, 4));
        }),
        ("`updates`: expected states [0], found []", |m| step(m, "layers.0.attn.headrope+kvwrite").updates.clear()),
        ("`updates`: expected states [], found [1]", |m| step(m, "embed").updates.push(1)),
        ("`after`: expected steps before 1, found 1", |m| step(m, "layers.0.attn.norm+matmul").after[0] = 1),
        ("it is written by step 0, which need not be done before", |m| {
            step(m, "layers.0.attn.norm+matmul").after.clear();
        }),
        ("it is read before it is written", |m| {
            let steps = &mut m.ranks[0].buckets[0].steps;
            steps.swap(0, 1);
            steps[0].after.clear();
        }),
        ("`cost`: expected numbers up to", |m| step(m, "embed").cost.flops = u64::MAX),
        ("steps: `embed` is there more than once", |m| step(m, "head.gather").name = "embed".into()),
        ("state kv.0: steps 3 and 4 use it in no order", |m| step(m, "layers.0.attn.attention").after[0] = 2),
        ("does not fit", |m| m.ranks[0].buckets[0].buffers[0].2 = 64),
    ]);
}

#[test]
fn buckets_and_overlaps() {
    check(&[
        ("`text`: expected one of 1 texts, found 1", |m| m.ranks[0].buckets[0].text = 1),
        ("`arena_lower_bound` <= `arena_bytes`", |m| m.ranks[0].buckets[0].arena_bytes = 1 << 30),
        ("bucket prefill_4, buffer h: expected a place inside of", |m| m.ranks[0].buckets[0].buffers[0].1 = 1 << 20),
        ("expected prefill, then decode", |m| m.ranks[0].buckets.swap(0, 1)),
        ("expected S and R of 2, found 1 and 2", |m| m.ranks[0].buckets[0].sequences = 1),
        ("expected at most 2 sequences, found 3", |m| m.ranks[0].buckets[1].tokens = 3),
        ("a bucket of fixed size beside those of a language model", |m| m.ranks[0].buckets[0].phase = Phase::Fixed),
        ("`head`: expected at most 16 steps, found 17", |m| m.ranks[0].buckets[0].head = 17),
        ("a step before the head reads `rows`", |m| m.ranks[0].buckets[0].head = 14),
        ("a step of the head updates a state", |m| m.ranks[0].buckets[0].head = 2),
        ("expected the output `logits`", |m| {
            m.ranks[0].buckets[0].outputs.pop();
        }),
        ("output `logits`: expected f32[2,16], found f32[2,8]", |m| {
            let gathered = step(m, "head.gather").writes[0];
            m.ranks[0].buckets[0].outputs[1].1 = gathered;
        }),
        ("expected the output `next`", |m| m.ranks[0].buckets[0].outputs[0].1 = Ref::Io(0)),
        ("outputs: `logits` is there more than once", |m| m.ranks[0].buckets[0].outputs[0].0 = "logits".into()),
        ("expected at most 4096 steps", |m| {
            let last = m.ranks[0].buckets[0].steps[0].clone();
            m.ranks[0].buckets[0].steps = vec![last; 5000];
        }),
        // All at offset 0: residual input and its sum, and many more.
        ("`h` at 0 and `h2` at 0 share bytes while both are needed", |m| {
            for buffer in &mut m.ranks[0].buckets[0].buffers {
                buffer.1 = 0;
            }
        }),
    ]);
}

#[test]
fn what_the_head_reads_is_not_overwritten_by_it() {
    let mut manifest = small();
    let bucket = &mut manifest.ranks[0].buckets[0];
    let position = |name: &str| bucket.buffers.iter().position(|Buffer(found, ..)| found == name).expect("a buffer");
    let (z, logits) = (position("z"), position("logits"));
    bucket.buffers[logits].1 = bucket.buffers[z].1;
    // `z` is dead by the time the logits are written, but a second run of the head reads it again.
    let faults = validate(&manifest, 1, 0).expect_err("z feeds the head");
    assert!(faults[0].message.contains("`z`") && faults[0].message.contains("`logits`"), "{faults:?}");
}

#[test]
fn collectives_are_in_an_order() {
    let mut manifest = small();
    let bucket = &mut manifest.ranks[0].buckets[0];
    let collective = Collective { kind: CollectiveKind::AllGather, size: 2, parts: vec![] };
    for at in [0, 2] {
        bucket.steps[at].collective = Some(collective.clone());
    }
    let found = |bucket: &Bucket| {
        let mut faults = Faults::default();
        ranks::in_order(bucket, "rank 0, bucket b", &mut faults);
        faults.0.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    bucket.steps[1].after = vec![0];
    bucket.steps[2].after = vec![1];
    assert!(found(bucket).is_empty(), "one step in between");
    bucket.steps[2].after = vec![];
    let (a, b) = (&bucket.steps[0].name, &bucket.steps[2].name);
    assert_eq!(found(bucket), [format!("rank 0, bucket b: collectives {a} and {b} are in no order")]);
}

#[test]
fn the_number_of_faults_is_bounded() {
    let mut manifest = small();
    let first = manifest.tensors[0].clone();
    manifest.tensors = vec![first; 10_000];
    assert_eq!(validate(&manifest, 1, 0).expect_err("one name ten thousand times").len(), MAX_FAULTS);
}
