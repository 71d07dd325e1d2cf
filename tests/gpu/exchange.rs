//! Exchanges through each other's memory, as several ranks on one GPU: each has a stream and an area of its own. Data are random, exchange
//! follows exchange without the host, and all of each rank's memory is compared with what copies on the host leave. Between GPUs the same
//! kernel runs in `tests/gpu_ranks.sh`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lfm2c::codegen::CompileOptions;
use lfm2c::cuda::{Device, DeviceMemory, Exchange, Graph, Part, Stream};
use lfm2c::ir::DType;
use lfm2c::plan::{AREA_STOP, ExchangeArea, ExchangeWay, PlanFile};
use lfm2c::runtime::cuda::Lines;
use lfm2c::runtime::synthetic::{element, key};
use libtest_mimic::Trial;

use crate::models::{SHAPES, fail, plan, small};

/// Bytes of a rank's memory.
const MEMORY: usize = 6 << 20;
/// Bytes to each other rank up to which launches of all ranks, each with the one that waits behind it, surely fit the GPU together.
const LITTLE: usize = 64 << 10;
/// Exchanges queued at a time.
const ROUND: usize = 48;
/// A round that takes longer waits for something that does not come.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn trials() -> Vec<Trial> {
    let trial = |ranks: u64| Trial::test(format!("exchange {ranks} ranks"), move || check(ranks).map_err(fail));
    let lonely = Trial::test("exchange given up", || give_up().map_err(fail));
    [2, 3].map(trial).into_iter().chain([lonely]).collect()
}

/// A rank of those on the GPU.
struct Rank {
    lines: Lines,
    stream: Stream,
    memory: DeviceMemory,
    /// What the memory should hold.
    expected: Vec<u8>,
}

/// Random numbers below a bound.
struct Numbers(u64, u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        let uniform = lfm2c::plan::Synthetic { salt: 0, center: 0.5, scale: 0.5 };
        self.1 += 1;
        (f64::from(element(self.0, &uniform, self.1)) * bound as f64) as u64 % bound
    }
}

fn plan_of(ranks: u64) -> PlanFile {
    // 2048 rows of 512 bytes are a wide exchange; as many blocks of three ranks as that takes would not fit the GPU together.
    let rows: &[u64] = if ranks == 2 { &[1400, 2048] } else { &[256] };
    let options = CompileOptions {
        expert_ranks: ranks,
        max_context: Some(2048),
        kv_tokens: Some(4096),
        ..small(rows, &[4], DType::BF16)
    };
    plan(&SHAPES[0], &options)
}

/// The ranks, and the memory of their areas.
fn ranks(file: &PlanFile) -> Result<(Vec<Rank>, Vec<DeviceMemory>, ExchangeArea)> {
    let device: Arc<Device> = Device::open(0)?;
    let area = ExchangeArea::of(&file.manifest.ranks[0], file.manifest.ranks.len() as u64)
        .context("the plan has exchanges")?;
    let setup = Stream::new(&device)?;
    let area_of = |_| -> Result<DeviceMemory> {
        let memory = DeviceMemory::new(&device, area.bytes() as usize)?;
        memory.fill(0..memory.bytes(), 0, &setup)?;
        Ok(memory)
    };
    let areas = (0..area.ranks).map(area_of).collect::<Result<Vec<_>>>()?;
    let addresses: Vec<u64> = areas.iter().map(DeviceMemory::address).collect();
    let rank = |rank: usize| -> Result<Rank> {
        let mut numbers = Numbers(key(rank as u64, 7), 0);
        let expected: Vec<u8> = (0..MEMORY).map(|_| numbers.below(256) as u8).collect();
        let memory = DeviceMemory::new(&device, MEMORY)?;
        memory.write(0, &expected, &setup)?;
        let lines = Lines::of_plan(file, &device, rank, &addresses)?;
        Ok(Rank { lines, stream: Stream::new(&device)?, memory, expected })
    };
    let ranks = (0..areas.len()).map(rank).collect::<Result<Vec<_>>>()?;
    setup.synchronize()?;
    Ok((ranks, areas, area))
}

fn check(count: u64) -> Result<()> {
    let file = plan_of(count);
    let (mut ranks, areas, area) = ranks(&file)?;
    ensure!((area.slot_bytes[1] > 0) == (count == 2), "expected wide exchanges of two ranks alone, found {area:?}");
    let mut numbers = Numbers(key(1, 2), 0);
    for round in 0..24 {
        let exchanges: Vec<(Exchange, Vec<Part>)> = (0..ROUND).map(|_| random(&mut numbers, area)).collect();
        // Every third round as graphs, which run twice.
        let times = if round % 3 == 2 { 2 } else { 1 };
        for _ in 0..times {
            exchanges.iter().for_each(|(kind, parts)| play(&mut ranks, *kind, parts));
        }
        if times == 1 {
            for (i, (kind, parts)) in exchanges.iter().enumerate() {
                for rank in &ranks {
                    let dependent = round % 3 == 1 && is_little(&exchanges, i);
                    rank.lines.exchange(*kind, parts, rank.memory.address(), &rank.stream, dependent)?;
                }
            }
            wait(&ranks, &areas)?;
        } else {
            let capture = |rank: &Rank| {
                Graph::capture(&rank.stream, || {
                    let mut all = exchanges.iter().enumerate();
                    all.try_for_each(|(i, (kind, parts))| {
                        let dependent = is_little(&exchanges, i);
                        rank.lines.exchange(*kind, parts, rank.memory.address(), &rank.stream, dependent)
                    })
                })
            };
            let graphs = ranks.iter().map(capture).collect::<Result<Vec<_>>>()?;
            for _ in 0..times {
                for (rank, graph) in ranks.iter().zip(&graphs) {
                    graph.launch(&rank.stream)?;
                }
            }
            wait(&ranks, &areas)?;
        }
        for (number, rank) in ranks.iter().enumerate() {
            let mut found = vec![0; MEMORY];
            rank.memory.read(0, &mut found, &rank.stream)?;
            let wrong = found.iter().zip(&rank.expected).position(|(found, expected)| found != expected);
            if let Some(at) = wrong {
                ensure!(
                    false,
                    "round {round}, rank {number}, byte {at}: expected {}, found {}",
                    rank.expected[at],
                    found[at]
                );
            }
        }
    }
    Ok(())
}

/// Whether an exchange and the one before it are so small that the second may begin before the first is done.
fn is_little(exchanges: &[(Exchange, Vec<Part>)], at: usize) -> bool {
    let bytes = |(_, parts): &(Exchange, Vec<Part>)| parts.iter().map(|part| part.bytes).sum::<usize>();
    at > 0 && exchanges[at - 1..=at].iter().all(|exchange| bytes(exchange) <= LITTLE)
}

/// An exchange that an area has room for: sizes from a few bytes on, at any even offset, parts apart from each other.
fn random(numbers: &mut Numbers, area: ExchangeArea) -> (Exchange, Vec<Part>) {
    loop {
        let exchange = any(numbers, area);
        let way = ExchangeWay::of(&exchange.1.iter().map(|part| part.bytes as u64).collect::<Vec<_>>());
        if way.slot_bytes() <= area.slot_bytes[usize::from(way.wide)] {
            return exchange;
        }
    }
}

fn any(numbers: &mut Numbers, area: ExchangeArea) -> (Exchange, Vec<Part>) {
    let kind = if numbers.below(2) == 0 { Exchange::AllGather } else { Exchange::AllToAll };
    let parts = if kind == Exchange::AllGather { 3 } else { 1 };
    let ranks = area.ranks as usize;
    // For each part what is sent and what is received.
    let room = MEMORY / (2 * parts) / 16 * 16;
    let largest = area.slot_bytes[0].max(area.slot_bytes[1]) / parts as u64;
    let most = largest.min((room / ranks) as u64) / 16 * 16;
    let limit = [most, most.min(20_000), most.min(100)][numbers.below(3) as usize];
    let unit = [2, 16][numbers.below(2) as usize];
    let part = |i: usize| {
        let bytes = (numbers.below(limit) / unit * unit).max(unit) as usize;
        let free = (room - ranks * bytes) as u64;
        let mut within = |start: usize| start + (numbers.below(free + 1) / unit * unit) as usize;
        Part { from: within(2 * i * room), to: within((2 * i + 1) * room), bytes }
    };
    (kind, (0..parts).map(part).collect())
}

/// What an exchange does, on the host.
fn play(ranks: &mut [Rank], kind: Exchange, parts: &[Part]) {
    for part in parts {
        let block = |from: &Rank, to: usize| {
            let start = part.from + if kind == Exchange::AllToAll { to * part.bytes } else { 0 };
            from.expected[start..][..part.bytes].to_vec()
        };
        let received: Vec<Vec<u8>> =
            (0..ranks.len()).map(|to| ranks.iter().flat_map(|from| block(from, to)).collect()).collect();
        for (rank, bytes) in ranks.iter_mut().zip(received) {
            rank.expected[part.to..][..bytes.len()].copy_from_slice(&bytes);
        }
    }
}

/// Waits for all ranks; if that takes too long, has them give up.
fn wait(ranks: &[Rank], areas: &[DeviceMemory]) -> Result<()> {
    let begun = Instant::now();
    for (number, rank) in ranks.iter().enumerate() {
        while !rank.stream.is_done()? {
            if begun.elapsed() > PATIENCE {
                stop(areas)?;
                ensure!(false, "rank {number}: expected its exchanges to end, found them waiting after {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    Ok(())
}

fn stop(areas: &[DeviceMemory]) -> Result<()> {
    let aside = Stream::new(&Device::open(0)?)?;
    areas.iter().try_for_each(|area| Ok(area.write(AREA_STOP as usize, &[1, 0, 0, 0], &aside)?))
}

/// A rank that is alone waits, and ends when it is told to.
fn give_up() -> Result<()> {
    let file = plan_of(2);
    let (ranks, areas, _) = ranks(&file)?;
    let parts = [Part { from: 0, to: 4096, bytes: 1024 }];
    ranks[0].lines.exchange(Exchange::AllToAll, &parts, ranks[0].memory.address(), &ranks[0].stream, false)?;
    std::thread::sleep(Duration::from_millis(50));
    let waited = !ranks[0].stream.is_done()?;
    stop(&areas)?;
    wait(&ranks, &areas)?;
    ensure!(waited, "expected an exchange with a rank that does nothing to wait, found it done");
    Ok(())
}
