//! An executor for tests: a model whose next token is a hash of all tokens of the sequence, read back from where the steps
//! wrote them. A wrong slot, position, page or row, one run twice or left out, or state left by another sequence gives
//! another hash or a panic.

use anyhow::{Result, bail};

use super::{Batch, Executor, SamplingParams};
use crate::plan::{Bucket, DType, Limits, Manifest, Model, Phase, Pool, Program, Region, Target, WeightSource};

/// Vocabulary of the mock model.
pub const VOCAB: u64 = 13;

const RING: usize = 8;
const EMPTY: (i32, i32) = (-1, -1);

/// A manifest with nothing but limits and buckets.
pub fn manifest(
    max_sequences: u64,
    max_context: u64,
    kv_tokens: u64,
    page_tokens: u64,
    buckets: Vec<Bucket>,
) -> Manifest {
    let region = Region { offset: 0, bytes: 0 };
    let pool = Pool { weights: region, state: region, arena: region, io: region };
    let program = Program { pool, weights: vec![], states: vec![], io: vec![], semantics: vec![], buckets };
    Manifest {
        compiler: "test".into(),
        model: Model {
            name: "mock".into(),
            model_type: "mock".into(),
            config_hash: String::new(),
            vocab: VOCAB,
            eos_tokens: vec![],
            weights: WeightSource::Synthetic(0),
            prompt: vec![1],
            forced_routing: None,
        },
        target: Target::Cpu,
        toolkit: None,
        dtype: DType::F32,
        limits: Limits { max_sequences, max_context, kv_tokens, page_tokens, ring_columns: RING as u64 },
        tensors: vec![],
        kernels: vec![],
        services: vec![],
        ranks: vec![program],
    }
}

/// A bucket without steps.
pub fn bucket(phase: Phase, tokens: u64, sequences: u64, rows: u64) -> Bucket {
    let kind = format!("{phase:?}").to_lowercase();
    Bucket {
        name: format!("{kind}_{tokens}"),
        phase,
        tokens,
        sequences,
        rows,
        arena_bytes: 0,
        arena_lower_bound: 0,
        buffers: vec![],
        steps: vec![],
        head: 0,
        outputs: vec![],
        text: 0,
    }
}

fn mix(hash: u64, value: u64) -> u64 {
    let mixed = (hash ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 29)
}

/// What the model makes of a history: the last row's logits.
pub fn logits_after(tokens: &[u32]) -> Vec<f32> {
    let hash = tokens.iter().fold(7, |hash, &token| mix(hash, u64::from(token)));
    logits_of(tokens.iter().rev().take(3).fold(hash, |hash, &token| mix(hash, u64::from(token))))
}

fn logits_of(hash: u64) -> Vec<f32> {
    (0..VOCAB).map(|token| (mix(hash, token) >> 40) as f32 / (1u64 << 24) as f32).collect()
}

/// The token chosen from logits at a position.
pub fn choose(logits: &[f32], params: SamplingParams, position: usize) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    if params.temperature == 0.0 {
        best as u32
    } else {
        (mix(params.seed, (best + position * 31) as u64) % VOCAB) as u32
    }
}

/// The executor.
pub struct Mock {
    manifest: Manifest,
    table: Vec<Vec<u32>>,
    sampling: Vec<SamplingParams>,
    /// Position and token of each place of each page.
    cells: Vec<(i32, i32)>,
    /// Position and token of each column of each slot's ring.
    rings: Vec<[(i32, i32); RING]>,
    /// Logits of every row of the last run.
    logits: Vec<Vec<f32>>,
    head_rows: Vec<i32>,
    /// Every batch that has run.
    pub trace: Vec<(usize, Batch)>,
    /// The run that fails, counted from 0.
    pub fails_at: Option<usize>,
    /// Added to each chosen token.
    pub token_offset: i32,
}

impl Mock {
    /// An executor with nothing in its state.
    pub fn new(manifest: Manifest) -> Self {
        let limits = &manifest.limits;
        let slots = limits.max_sequences as usize;
        Mock {
            table: vec![vec![u32::MAX; limits.pages_per_sequence() as usize]; slots],
            sampling: vec![SamplingParams::default(); slots],
            cells: vec![EMPTY; (limits.pages() * limits.page_tokens) as usize],
            rings: vec![[EMPTY; RING]; slots],
            logits: vec![],
            head_rows: vec![],
            trace: vec![],
            fails_at: None,
            token_offset: 0,
            manifest,
        }
    }

    fn cell(&mut self, slot: usize, position: usize) -> &mut (i32, i32) {
        let page_tokens = self.manifest.limits.page_tokens as usize;
        let page = self.table[slot][position / page_tokens] as usize;
        &mut self.cells[page * page_tokens + position % page_tokens]
    }

    /// The runs of adjacent rows of one slot, checked against the bucket and each other.
    fn shares(&self, bucket: &Bucket, batch: &Batch) -> Vec<std::ops::Range<usize>> {
        let count = batch.tokens.len();
        assert!(count > 0 && count as u64 <= bucket.tokens, "{count} rows in {}", bucket.name);
        assert_eq!((batch.positions.len(), batch.slots.len()), (count, count));
        let starts: Vec<usize> = (0..count).filter(|&i| i == 0 || batch.slots[i] != batch.slots[i - 1]).collect();
        let shares: Vec<_> = starts.iter().zip(starts[1..].iter().chain([&count])).map(|(&a, &b)| a..b).collect();
        assert!(shares.len() as u64 <= bucket.sequences, "{} sequences in {}", shares.len(), bucket.name);
        for (index, share) in shares.iter().enumerate() {
            let slot = batch.slots[share.start];
            assert!(slot >= 0 && (slot as u64) < self.manifest.limits.max_sequences, "slot {slot}");
            assert!(shares[..index].iter().all(|other| batch.slots[other.start] != slot), "rows of slot {slot} apart");
            assert!(share.clone().skip(1).all(|i| batch.positions[i] == batch.positions[i - 1] + 1));
            assert!(bucket.phase == Phase::Prefill || share.len() == 1, "{} rows of a sequence in decode", share.len());
        }
        shares
    }

    fn check_rows(bucket: &Bucket, count: usize, rows: &[i32]) {
        assert!(rows.len() as u64 <= bucket.rows, "{} rows with logits in {}", rows.len(), bucket.name);
        assert!(rows.iter().all(|&row| row >= 0 && (row as usize) < count), "{rows:?} of {count}");
        assert!(rows.is_sorted_by(|a, b| a < b), "{rows:?}");
    }
}

impl Executor for Mock {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn set_pages(&mut self, slot: u32, pages: &[u32]) -> Result<()> {
        assert!(pages.iter().all(|&page| u64::from(page) < self.manifest.limits.pages()), "{pages:?}");
        self.table[slot as usize][..pages.len()].copy_from_slice(pages);
        Ok(())
    }

    fn set_sampling(&mut self, slot: u32, params: SamplingParams) -> Result<()> {
        self.sampling[slot as usize] = params;
        Ok(())
    }

    fn run(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        if self.fails_at == Some(self.trace.len()) {
            self.fails_at = None;
            bail!("the device is gone");
        }
        let shares = self.shares(&self.manifest.ranks[0].buckets[bucket], batch);
        Self::check_rows(&self.manifest.ranks[0].buckets[bucket], batch.tokens.len(), &batch.rows);
        self.trace.push((bucket, batch.clone()));
        self.logits.clear();
        for i in 0..batch.tokens.len() {
            *self.cell(batch.slots[i] as usize, batch.positions[i] as usize) = (batch.positions[i], batch.tokens[i]);
        }
        for share in shares {
            let slot = batch.slots[share.start] as usize;
            let first = batch.positions[share.start];
            for i in share.clone() {
                let position = batch.positions[i];
                let mut hash = 7;
                for at in 0..=position {
                    let (found, token) = *self.cell(slot, at as usize);
                    assert_eq!(found, at, "slot {slot} at position {position}");
                    hash = mix(hash, token as u64);
                }
                for at in (0..=position).rev().take(3) {
                    let column = self.rings[slot][at as usize % RING];
                    let (found, token) =
                        if at >= first { (at, batch.tokens[share.start + (at - first) as usize]) } else { column };
                    assert_eq!(found, at, "ring of slot {slot} at position {position}");
                    hash = mix(hash, token as u64);
                }
                self.logits.push(logits_of(hash));
            }
            for i in share {
                let position = batch.positions[i];
                self.rings[slot][position as usize % RING] = (position, batch.tokens[i]);
            }
        }
        self.head_rows.clone_from(&batch.rows);
        Ok(())
    }

    fn run_head(&mut self, bucket: usize, rows: &[i32]) -> Result<()> {
        assert_eq!(self.trace.last().map(|run| run.0), Some(bucket));
        Self::check_rows(&self.manifest.ranks[0].buckets[bucket], self.logits.len(), rows);
        self.head_rows = rows.to_vec();
        Ok(())
    }

    fn next_tokens(&mut self) -> Result<Vec<i32>> {
        let (_, batch) = self.trace.last().unwrap();
        let choose = |&row: &i32| {
            let row = row as usize;
            let params = self.sampling[batch.slots[row] as usize];
            choose(&self.logits[row], params, batch.positions[row] as usize) as i32 + self.token_offset
        };
        Ok(self.head_rows.iter().map(choose).collect())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        Ok(self.head_rows.iter().flat_map(|&row| self.logits[row as usize].clone()).collect())
    }
}
