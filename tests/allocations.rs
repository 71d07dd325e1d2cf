//! Once all sequences decode, the generate loop allocates nothing on the host.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result};
use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::plan::Manifest;
use lfm2c::runtime::{Batch, Executor, Generator, Options, Request, SamplingParams, batch};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting what each thread asks of it.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came; the counter allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Chooses token 1 always.
struct Ones {
    manifest: Manifest,
    lookahead: usize,
    flight: VecDeque<usize>,
}

impl Executor for Ones {
    fn device(&self) -> String {
        "a mock".into()
    }

    fn force_experts(&mut self, _slot: i32, _choices: Vec<i32>) {}

    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn lookahead(&self) -> usize {
        self.lookahead
    }

    fn set_pages(&mut self, _: u32, _: &[u32]) -> Result<()> {
        Ok(())
    }

    fn set_sampling(&mut self, _: u32, _: SamplingParams) -> Result<()> {
        Ok(())
    }

    fn set_stops(&mut self, _: u32, _: &[u32], _: u32) -> Result<()> {
        Ok(())
    }

    fn enqueue(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        batch::check(batch, &self.manifest.ranks[0].buckets[bucket], &self.manifest)?;
        self.flight.push_back(batch.rows.len());
        Ok(())
    }

    fn collect(&mut self, tokens: &mut Vec<i32>) -> Result<()> {
        let rows = self.flight.pop_front().context("nothing is in flight")?;
        tokens.extend(std::iter::repeat_n(1, rows));
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        self.flight.clear();
        Ok(())
    }

    fn run_head(&mut self, _: usize, _: &[i32]) -> Result<()> {
        Ok(())
    }

    fn logits(&mut self, _: &mut Vec<f32>) -> Result<()> {
        Ok(())
    }
}

#[test]
fn decoding_allocates_nothing() {
    let recipe =
        Recipe::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("plans/synthetic.ron")).expect("it is readable");
    let options = CompileOptions {
        prefill: Some(vec![16]),
        decode: Some(vec![1, 4]),
        max_sequences: Some(8),
        max_context: Some(128),
        kv_tokens: Some(1024),
        ..CompileOptions::default()
    };
    let plan = compile(&Source::Recipe(Box::new(recipe), None), &options, &Silent).expect("the demo compiles");
    for lookahead in [1, 4] {
        let flight = VecDeque::with_capacity(lookahead);
        let mut executor = Ones { manifest: plan.file.manifest.clone(), lookahead, flight };
        let mut generator = Generator::new(&mut executor, Options::default()).expect("it is a language model's plan");
        // Rounds of two steps, the second with padding.
        let requests = (0..7).map(|id| Request {
            id,
            prompt: vec![1; 10 + id as usize],
            max_new_tokens: 100,
            eos: vec![2],
            ..Request::default()
        });
        let (mut seen, mut counts) = (0, Vec::with_capacity(100));
        let on_token = |id, _| {
            if id == 0 {
                seen += 1;
                // The last sequence has begun by the first, and none has ended by the second.
                if seen == 30 || seen == 90 {
                    counts.push(ALLOCATIONS.get());
                }
            }
            ControlFlow::Continue(())
        };
        let results = generator.generate(requests.collect(), on_token).expect("it runs");
        assert!(results.iter().all(|result| result.as_ref().is_ok_and(|finished| finished.tokens.len() == 100)));
        assert_eq!(counts.len(), 2);
        assert!(counts[0] > 0, "the counter counts");
        assert_eq!(counts[1] - counts[0], 0, "allocations of 60 rounds with a lookahead of {lookahead}");
    }
}
