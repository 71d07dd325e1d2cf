//! An executor for tests: a model whose next token is a hash of all tokens of the sequence, read back from where the steps
//! wrote them. A wrong slot, position, page or row, one run twice or left out, or state left by another sequence gives
//! another hash or a panic. So does a pending token that the host knows or that nobody chose, a row of a sequence whose slot
//! or pages have gone to another one, or more steps in flight than may be.

use std::collections::VecDeque;

use anyhow::{Context, Result, bail};

use super::group::{Group, LocalGroup};
use super::{Batch, Executor, PENDING, SamplingParams};
use crate::plan::{
    Bucket, DType, Instr, Limits, Manifest, Model, Op, Phase, Pool, Program, Region, Semantic, Slot, Target,
    TensorType, WeightSource,
};

/// Vocabulary of the mock model.
pub const VOCAB: u64 = 13;

/// Columns of a slot's ring, and how many positions a row looks at in it, its own among them.
pub const RING: usize = 8;
const TAPS: usize = 3;
const EMPTY: (i32, i32) = (-1, -1);

/// A manifest with nothing but limits, buckets, and a convolution that no step is of.
pub fn manifest(
    max_sequences: u64,
    max_context: u64,
    kv_tokens: u64,
    page_tokens: u64,
    buckets: Vec<Bucket>,
) -> Manifest {
    let region = Region { offset: 0, bytes: 0 };
    let pool = Pool { weights: region, state: region, arena: region, io: region };
    let conv = Semantic {
        name: "conv".into(),
        inputs: [vec![1, 1], vec![1, TAPS as u64], vec![max_sequences, RING as u64, 1], vec![1], vec![1]]
            .map(|shape| TensorType(DType::F32, shape))
            .to_vec(),
        outputs: vec![TensorType(DType::F32, vec![1, 1])],
        temps: vec![],
        body: vec![Instr(Op::Conv1dCausal, (0..5).map(Slot::In).collect(), vec![Slot::Out(0)])],
    };
    let program =
        Program { pool, weights: vec![], packed: vec![], states: vec![], io: vec![], semantics: vec![conv], buckets };
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
        experts: vec![],
        stages: vec![],
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
    logits_of(tokens.iter().rev().take(TAPS).fold(hash, |hash, &token| mix(hash, u64::from(token))))
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

/// What a slot has of its sequence.
#[derive(Clone, Default)]
struct Place {
    table: Vec<u32>,
    sampling: SamplingParams,
    /// Position and token of each column of the ring.
    ring: [(i32, i32); RING],
    eos: Vec<u32>,
    last_position: i32,
    /// Position of the row that must come next; none before a sequence's first, which may go on with what the slot holds.
    next: Option<i32>,
    /// The token chosen last.
    last: Option<i32>,
    /// Whether a token that ends the sequence was chosen.
    ended: bool,
}

/// The executor.
pub struct Mock {
    manifest: Manifest,
    places: Vec<Place>,
    /// The slot that each page belongs to.
    owners: Vec<usize>,
    /// Position and token of each place of each page.
    cells: Vec<(i32, i32)>,
    /// Tokens chosen by each step in flight, and for which slots.
    flight: VecDeque<Vec<(usize, i32)>>,
    /// Logits of every row of the last run.
    logits: Vec<Vec<f32>>,
    head_rows: Vec<i32>,
    /// Every batch that has run.
    pub trace: Vec<(usize, Batch)>,
    /// An `e` for each step enqueued, a `c` for each collected.
    pub events: String,
    /// Steps in flight at the most.
    lookahead: usize,
    /// Whether rows of sequences that a token has ended are turned into padding.
    stops: bool,
    /// The run that fails, counted from 0.
    pub fails_at: Option<usize>,
    /// Added to each chosen token.
    pub token_offset: i32,
    /// The ranks that run the same steps.
    pub group: Option<LocalGroup>,
}

impl Mock {
    /// An executor with nothing in its state.
    pub fn new(manifest: Manifest) -> Self {
        let limits = &manifest.limits;
        let table = vec![u32::MAX; limits.pages_per_sequence() as usize];
        let place = Place { table, ring: [EMPTY; RING], ..Place::default() };
        Mock {
            places: vec![place; limits.max_sequences as usize],
            owners: vec![usize::MAX; limits.pages() as usize],
            cells: vec![EMPTY; (limits.pages() * limits.page_tokens) as usize],
            flight: VecDeque::new(),
            logits: vec![],
            head_rows: vec![],
            trace: vec![],
            events: String::new(),
            lookahead: 1,
            stops: false,
            fails_at: None,
            token_offset: 0,
            group: None,
            manifest,
        }
    }

    /// An executor that lets so many steps be in flight, and may turn rows of ended sequences into padding.
    pub fn ahead(manifest: Manifest, lookahead: usize, stops: bool) -> Self {
        Mock { lookahead, stops, ..Mock::new(manifest) }
    }

    fn cell(&mut self, slot: usize, position: usize) -> &mut (i32, i32) {
        let page_tokens = self.manifest.limits.page_tokens as usize;
        let page = self.places[slot].table[position / page_tokens] as usize;
        assert_eq!(self.owners[page], slot, "page {page} has gone to another slot");
        &mut self.cells[page * page_tokens + position % page_tokens]
    }

    /// The token of a row, which may be pending.
    fn token(&self, token: i32, slot: usize) -> i32 {
        if token != PENDING {
            return token;
        }
        let unknown = self.flight.iter().flatten().any(|&(of, _)| of == slot);
        assert!(unknown, "the host knows the token of slot {slot}");
        self.places[slot].last.expect("its sequence has chosen a token")
    }

    /// Runs a sequence's rows; gives their logits.
    fn run_share(&mut self, slot: usize, positions: &[i32], tokens: &[i32]) -> Vec<Vec<f32>> {
        let (first, count) = (positions[0], positions.len() as i32);
        let place = &mut self.places[slot];
        assert_eq!(first, place.next.unwrap_or(first), "slot {slot}: its next row");
        place.next = Some(first + count);
        assert!(first + count <= place.last_position + 1, "slot {slot}: rows past {}", place.last_position);
        assert!(count == 1 || !tokens.contains(&PENDING), "slot {slot}: a pending token among {count} rows");
        if self.stops && place.ended {
            return vec![vec![0.0; VOCAB as usize]; positions.len()];
        }
        let tokens: Vec<i32> = tokens.iter().map(|&token| self.token(token, slot)).collect();
        for (&position, &token) in positions.iter().zip(&tokens) {
            *self.cell(slot, position as usize) = (position, token);
        }
        let logits = positions.iter().map(|&position| {
            let mut hash = 7;
            for at in 0..=position {
                let (found, token) = *self.cell(slot, at as usize);
                assert_eq!(found, at, "slot {slot} at position {position}");
                hash = mix(hash, token as u64);
            }
            for at in (0..=position).rev().take(TAPS) {
                let column = self.places[slot].ring[at as usize % RING];
                let (found, token) = if at >= first { (at, tokens[(at - first) as usize]) } else { column };
                assert_eq!(found, at, "ring of slot {slot} at position {position}");
                hash = mix(hash, token as u64);
            }
            logits_of(hash)
        });
        let logits = logits.collect();
        for (&position, &token) in positions.iter().zip(&tokens) {
            self.places[slot].ring[position as usize % RING] = (position, token);
        }
        logits
    }

    /// Chooses the token of a row of the last run.
    fn choose(&mut self, slot: usize, position: i32, row: usize) -> i32 {
        let place = &mut self.places[slot];
        if self.stops && place.ended {
            return -1;
        }
        let token = choose(&self.logits[row], place.sampling, position as usize);
        place.ended |= place.eos.contains(&token);
        let token = token as i32 + self.token_offset;
        place.last = Some(token);
        token
    }

    /// The runs of adjacent rows of one slot, checked against the bucket and each other.
    fn shares(&self, bucket: &Bucket, batch: &Batch) -> Vec<std::ops::Range<usize>> {
        let count = batch.tokens.len();
        if count == 0 && self.group.is_some() {
            // Others have rows.
            return vec![];
        }
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
    fn device(&self) -> String {
        "a mock".into()
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        self.group.as_mut().map(|group| group as &mut dyn Group)
    }

    fn force_experts(&mut self, _slot: i32, _choices: Vec<i32>) {}

    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn lookahead(&self) -> usize {
        self.lookahead
    }

    fn set_pages(&mut self, slot: u32, pages: &[u32]) -> Result<()> {
        assert!(pages.iter().all(|&page| u64::from(page) < self.manifest.limits.pages()), "{pages:?}");
        self.places[slot as usize].table[..pages.len()].copy_from_slice(pages);
        pages.iter().for_each(|&page| self.owners[page as usize] = slot as usize);
        Ok(())
    }

    fn set_sampling(&mut self, slot: u32, params: SamplingParams) -> Result<()> {
        self.places[slot as usize].sampling = params;
        Ok(())
    }

    fn set_stops(&mut self, slot: u32, eos: &[u32], last_position: u32) -> Result<()> {
        let place = &mut self.places[slot as usize];
        (place.eos, place.last_position) = (eos.to_vec(), last_position as i32);
        (place.next, place.last, place.ended) = (None, None, false);
        Ok(())
    }

    fn enqueue(&mut self, bucket: usize, batch: &Batch) -> Result<()> {
        assert!(self.flight.len() < self.lookahead, "{} steps in flight", self.flight.len());
        if self.fails_at == Some(self.trace.len()) {
            self.fails_at = None;
            bail!("the device is gone");
        }
        let shares = self.shares(&self.manifest.ranks[0].buckets[bucket], batch);
        Self::check_rows(&self.manifest.ranks[0].buckets[bucket], batch.tokens.len(), &batch.rows);
        self.trace.push((bucket, batch.clone()));
        self.events.push('e');
        self.logits.clear();
        for share in shares {
            let slot = batch.slots[share.start] as usize;
            let logits = self.run_share(slot, &batch.positions[share.clone()], &batch.tokens[share]);
            self.logits.extend(logits);
        }
        self.head_rows.clone_from(&batch.rows);
        let chosen = batch.rows.iter().map(|&row| {
            let slot = batch.slots[row as usize] as usize;
            (slot, self.choose(slot, batch.positions[row as usize], row as usize))
        });
        let chosen = chosen.collect();
        self.flight.push_back(chosen);
        Ok(())
    }

    fn collect(&mut self, tokens: &mut Vec<i32>) -> Result<()> {
        let chosen = self.flight.pop_front().context("nothing is in flight")?;
        self.events.push('c');
        tokens.extend(chosen.iter().map(|&(_, token)| token));
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        self.flight.clear();
        Ok(())
    }

    fn run_head(&mut self, bucket: usize, rows: &[i32]) -> Result<()> {
        assert!(self.flight.is_empty(), "steps are in flight");
        assert_eq!(self.trace.last().map(|run| run.0), Some(bucket));
        Self::check_rows(&self.manifest.ranks[0].buckets[bucket], self.logits.len(), rows);
        self.head_rows = rows.to_vec();
        Ok(())
    }

    fn logits(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        assert!(self.flight.is_empty(), "steps are in flight");
        logits.extend(self.head_rows.iter().flat_map(|&row| &self.logits[row as usize]));
        Ok(())
    }
}
