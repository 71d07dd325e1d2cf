//! The executor on a small program built by hand: embedding, convolution, residual product, head, sampling.

use std::sync::Arc;

use super::{bits, noise, ty};
use crate::plan::*;
use crate::runtime::cpu::{CpuExecutor, HostPool};
use crate::runtime::sampling::argmax;
use crate::runtime::{Batch, Executor, PENDING, SamplingParams};

const VOCAB: usize = 11;
const WIDTH: usize = 8;
const SLOTS: usize = 3;

fn semantic(name: &str, inputs: &[&TensorType], outputs: &[&TensorType], op: Op) -> Semantic {
    let slots = |count: usize, slot: fn(u32) -> Slot| (0..count as u32).map(slot).collect();
    let body = vec![Instr(op, slots(inputs.len(), Slot::In), slots(outputs.len(), Slot::Out))];
    let list = |types: &[&TensorType]| types.iter().map(|ty| (*ty).clone()).collect();
    Semantic { name: name.into(), inputs: list(inputs), outputs: list(outputs), temps: vec![], body }
}

fn step(name: &str, op: usize, reads: &[Ref], writes: &[Ref]) -> Step {
    let cost = Cost::default();
    let (reads, writes) = (reads.to_vec(), writes.to_vec());
    Step {
        name: name.into(),
        op: op as u32,
        reads,
        writes,
        updates: vec![],
        after: vec![],
        cost,
        launch: None,
        collective: None,
        library: None,
    }
}

/// A bucket and its semantics, which are numbered from `first`.
fn bucket(name: &str, phase: Phase, tokens: usize, rows: usize, first: usize) -> (Bucket, Vec<Semantic>) {
    let float = |shape: &[usize]| ty(DType::F32, shape);
    let int = |shape: &[usize]| ty(DType::I32, shape);
    let (h, row, logits) = (float(&[tokens, WIDTH]), float(&[rows, WIDTH]), float(&[rows, VOCAB]));
    let (table, taps, square) = (float(&[VOCAB, WIDTH]), float(&[WIDTH, 3]), float(&[WIDTH, WIDTH]));
    let (ring, params) = (float(&[SLOTS, 4, WIDTH]), int(&[SLOTS, 8]));
    let (per_token, per_row) = (int(&[tokens]), int(&[rows]));
    let add = vec![Expr::Arg(0), Expr::Arg(1), Expr::Binary(BinaryFn::Add, 0, 1)];
    let mut residual = semantic("matmul+residual", &[&h, &square, &h], &[&h], Op::Matmul);
    residual.temps = vec![h.clone()];
    residual.body = vec![
        Instr(Op::Matmul, vec![Slot::In(0), Slot::In(1)], vec![Slot::Temp(0)]),
        Instr(Op::Pointwise(add), vec![Slot::In(2), Slot::Temp(0)], vec![Slot::Out(0)]),
    ];
    let semantics = vec![
        semantic("embed", &[&per_token, &table], &[&h], Op::Embed),
        semantic("shortconv", &[&h, &taps, &ring, &per_token, &per_token], &[&h], Op::Conv1dCausal),
        residual,
        semantic("gather", &[&h, &per_row], &[&row], Op::GatherRows),
        semantic("matmul", &[&row, &table], &[&logits], Op::Matmul),
        semantic("sample", &[&logits, &per_row, &per_token, &per_token, &params], &[&per_row], Op::Sample),
    ];
    use Ref::{Arena, Io, State, Weight};
    let steps = vec![
        step("embed", first, &[Io(0), Weight(0)], &[Arena(0)]),
        step("conv", first + 1, &[Arena(0), Weight(1), State(0), Io(1), Io(2)], &[Arena(1)]),
        step("residual", first + 2, &[Arena(1), Weight(2), Arena(0)], &[Arena(2)]),
        step("gather", first + 3, &[Arena(2), Io(3)], &[Arena(3)]),
        step("head", first + 4, &[Arena(3), Weight(0)], &[Arena(4)]),
        step("sample", first + 5, &[Arena(4), Io(3), Io(1), Io(2), State(1)], &[Io(4)]),
    ];
    // The head's buffers reuse the room of the first two.
    let buffer = |name: &str, offset, ty: &TensorType| Buffer(name.into(), offset, ty.bytes().unwrap());
    let buffers = vec![
        buffer("h", 0, &h),
        buffer("conv", 256, &h),
        buffer("out", 512, &h),
        buffer("row", 0, &row),
        buffer("logits", 256, &logits),
    ];
    let outputs = vec![("logits".into(), Arena(4)), ("next".into(), Io(4))];
    let (tokens, rows) = (tokens as u64, rows as u64);
    let name = name.into();
    let bucket = Bucket {
        name,
        phase,
        tokens,
        rows,
        sequences: rows,
        arena_bytes: 768,
        arena_lower_bound: 768,
        buffers,
        steps,
        head: 3,
        outputs,
        text: 0,
    };
    (bucket, semantics)
}

fn manifest() -> Manifest {
    let (prefill, mut semantics) = bucket("prefill_8", Phase::Prefill, 8, 2, 0);
    let (decode, more) = bucket("decode_2", Phase::Decode, 2, 2, semantics.len());
    semantics.extend(more);
    let weight = |name: &str, offset, shape: &[usize]| Weight {
        name: name.into(),
        ty: ty(DType::F32, shape),
        offset,
        layout: Layout::Copy(0),
        indices: vec![],
    };
    let state = |name: &str, offset, ty, role| State { name: name.into(), ty, offset, role };
    let io = |name: &str, at: u64, input| Io { name: name.into(), offset: 256 * at, bytes: 32, input };
    let program = Program {
        pool: Pool {
            weights: Region { offset: 0, bytes: 1024 },
            state: Region { offset: 1024, bytes: 512 },
            arena: Region { offset: 1536, bytes: 768 },
            io: Region { offset: 2304, bytes: 1280 },
        },
        weights: vec![
            weight("embed", 0, &[VOCAB, WIDTH]),
            weight("taps", 512, &[WIDTH, 3]),
            weight("square", 768, &[WIDTH, WIDTH]),
        ],
        packed: vec![],
        states: vec![
            state("ring", 0, ty(DType::F32, &[SLOTS, 4, WIDTH]), StateRole::ConvRing),
            state("sampling", 384, ty(DType::I32, &[SLOTS, 8]), StateRole::Sampling),
        ],
        io: vec![
            io("tokens", 0, true),
            io("pos", 1, true),
            io("slot", 2, true),
            io("rows", 3, true),
            io("next", 4, false),
        ],
        semantics,
        buckets: vec![prefill, decode],
    };
    Manifest {
        compiler: "test".into(),
        model: Model {
            name: "test".into(),
            model_type: "lfm2".into(),
            config_hash: String::new(),
            vocab: VOCAB as u64,
            eos_tokens: vec![],
            weights: WeightSource::Checkpoint,
            prompt: vec![],
            forced_routing: None,
        },
        target: Target::Cpu,
        toolkit: None,
        dtype: DType::F32,
        limits: Limits {
            max_sequences: SLOTS as u64,
            max_context: 16,
            kv_tokens: 64,
            page_tokens: 64,
            ring_columns: 4,
        },
        tensors: vec![],
        kernels: vec![],
        services: vec![],
        experts: vec![],
        stages: vec![],
        ranks: vec![program],
    }
}

fn executor(manifest: Manifest, poison: bool) -> CpuExecutor {
    let mut pool = HostPool::new(&manifest.ranks[0]).unwrap();
    for weight in &manifest.ranks[0].weights {
        let values = noise(weight.offset, weight.ty.elements().unwrap() as usize, DType::F32);
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        pool.weights_mut()[weight.offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    CpuExecutor::new(Arc::new(manifest), 0, pool).unwrap().with_poison(poison)
}

/// Rows of slots, each from a position on.
fn batch(sequences: &[(i32, i32, &[i32])], rows: &[i32]) -> Batch {
    let mut batch = Batch { rows: rows.to_vec(), ..Batch::default() };
    for &(slot, start, tokens) in sequences {
        batch.tokens.extend(tokens);
        batch.positions.extend(start..start + tokens.len() as i32);
        batch.slots.extend(vec![slot; tokens.len()]);
    }
    batch
}

fn last_logits(executor: &mut CpuExecutor) -> Vec<f32> {
    let mut logits = vec![];
    executor.logits(&mut logits).unwrap();
    logits
}

const PROMPT: [i32; 6] = [3, 1, 4, 1, 5, 9];

/// Logits of each position of the prompt in a slot, fed by chunks, with a neighbour in the same batches.
fn logits(executor: &mut CpuExecutor, slot: i32, chunk: usize, neighbour: bool) -> Vec<u32> {
    let mut all = vec![];
    for (i, tokens) in PROMPT.chunks(chunk).enumerate() {
        let mut sequences = vec![(slot, (i * chunk) as i32, tokens)];
        if neighbour {
            sequences.insert(0, ((slot + 1) % 3, i as i32, &PROMPT[i..i + 1]));
        }
        let first = usize::from(neighbour);
        executor.run(0, &batch(&sequences, &[first as i32])).unwrap();
        for row in first..first + tokens.len() {
            executor.run_head(0, &[row as i32]).unwrap();
            let logits = last_logits(executor);
            assert_eq!(executor.next_tokens(0, 1).unwrap(), [argmax(&logits) as i32]);
            assert!(logits.iter().all(|x| x.is_finite()));
            all.extend(bits(&logits));
        }
    }
    all
}

#[test]
fn neither_poison_nor_chunks_nor_neighbours_change_a_bit() {
    let expected = logits(&mut executor(manifest(), false), 0, 6, false);
    assert_eq!(expected.len(), PROMPT.len() * VOCAB);
    for poison in [false, true] {
        for (slot, chunk, neighbour) in [(0, 6, false), (2, 1, false), (1, 2, true), (0, 3, true), (2, 6, true)] {
            let found = logits(&mut executor(manifest(), poison), slot, chunk, neighbour);
            assert_eq!(found, expected, "poison {poison}, slot {slot}, chunks of {chunk}, neighbour {neighbour}");
        }
    }
    // A slot that another sequence has used.
    let mut used = executor(manifest(), true);
    used.run(0, &batch(&[(1, 0, &[7, 7, 7, 7, 7])], &[4])).unwrap();
    assert_eq!(logits(&mut used, 1, 2, false), expected);
    // The last position in a decode bucket, with and without a neighbour.
    for neighbour in [false, true] {
        let mut decode = executor(manifest(), true);
        decode.run(0, &batch(&[(0, 0, &PROMPT[..5])], &[4])).unwrap();
        let both = [(0, 5, &PROMPT[5..]), (2, 0, &PROMPT[..1])];
        decode.run(1, &batch(&both[..1 + usize::from(neighbour)], &[0])).unwrap();
        assert_eq!(bits(&last_logits(&mut decode)), expected[5 * VOCAB..]);
    }
}

#[test]
fn poison_shows_a_read_of_what_nobody_wrote() {
    let broken = |change: fn(&mut Bucket)| {
        let mut manifest = manifest();
        change(&mut manifest.ranks[0].buckets[0]);
        [false, true].map(|poison| {
            let mut executor = executor(manifest.clone(), poison);
            executor.run(0, &batch(&[(0, 0, &PROMPT)], &[5])).unwrap();
            last_logits(&mut executor).iter().all(|x| x.is_finite())
        })
    };
    assert_eq!(broken(|_| ()), [true, true]);
    // The head reads what it has yet to write, where the embedding's numbers were before.
    assert_eq!(broken(|bucket| bucket.steps[3].reads[0] = Ref::Arena(3)), [true, false]);
    // A buffer that no step writes.
    assert_eq!(
        broken(|bucket| {
            bucket.buffers.push(Buffer("nobody".into(), 512, 256));
            bucket.steps[2].reads[2] = Ref::Arena(5);
        }),
        [true, false]
    );
}

#[test]
fn poison_fills_all_but_what_is_live() {
    let mut executor = executor(manifest(), true);
    executor.run(0, &batch(&[(0, 0, &PROMPT)], &[5])).unwrap();
    // Before the head, of the arena only `out` is live, and only as far as it goes.
    executor.run_step(0, 3).unwrap();
    let arena = executor.pool().arena();
    let row = 2 * WIDTH * 4;
    assert!(arena[row..512].iter().all(|byte| *byte == 0xff));
    assert!(arena[..row].iter().any(|byte| *byte != 0xff));
    assert!(arena[512..768].iter().any(|byte| *byte != 0xff));
}

#[test]
fn samples_by_slot_and_position() {
    let mut executor = executor(manifest(), true);
    let params = SamplingParams { temperature: 1.5, seed: 5 << 33 | 7, top_k: 6, top_p: 0.95, min_p: 0.01 };
    executor.set_sampling(1, params).unwrap();
    executor.set_sampling(0, SamplingParams::default()).unwrap();
    let next = executor.run(0, &batch(&[(1, 0, &PROMPT[..3]), (0, 0, &PROMPT[..2])], &[2, 4])).unwrap();
    let logits = last_logits(&mut executor);
    let drawn = crate::runtime::sampling::choose(&logits[..VOCAB], &params, 2);
    assert_eq!(next, [drawn as i32, argmax(&logits[VOCAB..]) as i32]);
    assert!(executor.set_sampling(3, params).is_err());
}

/// Rows of pending tokens are those of the same tokens known, also where a step without them came between.
#[test]
fn a_pending_token_is_the_one_chosen_last() {
    let steps = |executor: &mut CpuExecutor, known: Option<&[i32]>| {
        let mut tokens = vec![];
        let pending = |i: usize| known.map_or(PENDING, |known| known[i]);
        for slot in [0, 2] {
            executor.set_stops(slot, &[], 15).unwrap();
        }
        executor.enqueue(0, &batch(&[(0, 0, &PROMPT), (2, 0, &[2])], &[5, 6])).unwrap();
        executor.enqueue(1, &batch(&[(2, 1, &[pending(1)])], &[0])).unwrap();
        executor.enqueue(0, &batch(&[(0, 6, &[pending(0)]), (2, 2, &[pending(2)])], &[0, 1])).unwrap();
        let logits = last_logits(executor);
        assert!(executor.enqueue(0, &batch(&[(0, 7, &[1])], &[0])).unwrap_err().to_string().contains("in flight"));
        for count in [2, 3, 5] {
            executor.collect(&mut tokens).unwrap();
            assert_eq!(tokens.len(), count);
        }
        assert!(executor.collect(&mut tokens).is_err(), "nothing is in flight");
        (tokens, bits(&logits))
    };
    let mut executor = executor(manifest(), true).with_lookahead(3);
    assert_eq!(executor.lookahead(), 3);
    let expected = steps(&mut executor, None);
    assert_eq!(steps(&mut executor, Some(&expected.0)), expected);

    let pending = |slot| batch(&[(slot, 7, &[PENDING])], &[0]);
    executor.enqueue(0, &pending(0)).unwrap();
    executor.discard().unwrap();
    assert!(executor.collect(&mut vec![]).is_err(), "it was discarded");
    executor.set_stops(0, &[], 15).unwrap();
    for slot in [0, 1] {
        let fault = executor.enqueue(0, &pending(slot)).unwrap_err().to_string();
        assert!(fault.contains("has chosen none"), "{fault}");
    }
    assert!(executor.set_stops(3, &[], 15).is_err());
}

#[test]
fn refuses_what_does_not_fit() {
    let cases: [(usize, Batch, &str); 12] = [
        (0, batch(&[(0, 0, &[1; 9])], &[0]), "9 rows, the bucket has 8"),
        (0, batch(&[(0, 0, &[11])], &[0]), "token 11 of a vocabulary of 11"),
        (0, batch(&[(0, 0, &[-1])], &[0]), "token -1"),
        (0, batch(&[(0, 15, &[1, 2])], &[0]), "position 16, a sequence has 16"),
        (0, batch(&[(3, 0, &[1])], &[0]), "slot 3 of 3"),
        (0, batch(&[(0, 0, &[1]), (1, 0, &[1]), (0, 1, &[1])], &[0]), "3 sequences, the bucket has 2"),
        (0, batch(&[(0, 0, &[1]), (0, 1, &[PENDING])], &[0]), "must be the only one of its sequence"),
        (0, batch(&[(0, 0, &[PENDING, 1])], &[0]), "must be the only one of its sequence"),
        (0, batch(&[(0, 1, &[1]), (0, 0, &[1])], &[0]), "position 0 after 1 does not ascend"),
        (0, batch(&[(0, 0, &[1])], &[1]), "logits of row 1, the batch has 1"),
        (1, batch(&[(0, 0, &[1, 2])], &[0]), "a decode bucket takes one row a sequence"),
        (2, batch(&[(0, 0, &[1])], &[0]), "no bucket 2 in a plan of 2"),
    ];
    let mut executor = executor(manifest(), false);
    for (bucket, batch, expected) in cases {
        let fault = format!("{:#}", executor.run(bucket, &batch).unwrap_err());
        assert!(fault.contains(expected), "expected {expected}, found {fault}");
    }
    assert!(executor.logits(&mut vec![]).is_err() && executor.run_head(0, &[0]).is_err());
    let mut apart = batch(&[(0, 0, &[1, 2])], &[0]);
    apart.positions.pop();
    assert!(executor.run(0, &apart).is_err());
    executor.run(0, &batch(&[(0, 0, &[1])], &[0])).unwrap();
    assert!(executor.run_head(1, &[0]).is_err() && executor.run_head(0, &[1]).is_err());

    let small = HostPool::new(&Program {
        pool: Pool { io: Region { offset: 2304, bytes: 4 }, ..manifest().ranks[0].pool.clone() },
        ..manifest().ranks[0].clone()
    })
    .unwrap();
    let fault = CpuExecutor::new(Arc::new(manifest()), 0, small).err().unwrap().to_string();
    assert!(fault.contains("a pool of 2308 bytes for a program that needs 3584"), "{fault}");
}

#[test]
fn inputs_and_results_by_name() {
    let mut executor = executor(manifest(), true);
    let bytes = |values: &[i32]| values.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>();
    for (name, values) in [("tokens", [3, 1]), ("pos", [0, 1]), ("slot", [2, 2]), ("rows", [1, -1])] {
        executor.set_input(name, &bytes(&values)).unwrap();
    }
    executor.run_steps(1).unwrap();
    let by_name = executor.output(1, "logits").unwrap();
    executor.run(0, &batch(&[(2, 0, &PROMPT[..2])], &[1])).unwrap();
    let expected = last_logits(&mut executor);
    assert_eq!(by_name[..VOCAB * 4], *bytemuck::cast_slice::<f32, u8>(&expected));
    assert!(by_name[VOCAB * 4..].iter().all(|byte| *byte == 0), "a padding row of logits");
    let fault = executor.set_input("token", &[0]).unwrap_err().to_string();
    assert!(fault.contains("no input `token`") && fault.contains("\"tokens\""), "{fault}");
    assert!(executor.output(0, "h").unwrap_err().to_string().contains("returns no `h`"));
    assert!(executor.set_input("tokens", &[0; 33]).is_err());
}
