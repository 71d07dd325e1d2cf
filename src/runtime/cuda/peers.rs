//! Exchanges between GPUs of one host through memory that each rank has mapped of the others: one launch of a kernel of the plan each.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};

use super::collective::Road;
use super::offers::{Offer, agree, missing};
use super::program::service_of;
use crate::cuda::{
    Argument, Device, DeviceMemory, Exchange, Function, LaunchShape, MappedMemory, MemoryHandle, Part, SharedMemory,
    Stream,
};
use crate::plan::{
    AREA_NAME, AREA_STOP, Collective, EXCHANGE_BLOCKS, ExchangeArea, ExchangeWay, PlanFile, Program, SERVICE_THREADS,
    ServiceRole, exchange_role, exchanges_of,
};
use crate::runtime::group::Group;

/// The kernels by which a rank exchanges with others, and the areas that they do it through.
pub struct Lines {
    /// By parts of an exchange.
    kernels: HashMap<usize, Function>,
    rank: usize,
    /// This rank's area, then those of the ranks after it, around.
    areas: Vec<u64>,
    area: ExchangeArea,
}

impl Lines {
    /// Of a rank's program, over areas at these addresses, by rank. They are zeros but for their names; see [`ExchangeArea`].
    ///
    /// # Errors
    /// The plan has no kernels for it, or the device cannot run them.
    pub fn of_plan(file: &PlanFile, device: &Arc<Device>, rank: usize, areas: &[u64]) -> Result<Lines> {
        let program = file.manifest.ranks.get(rank).with_context(|| format!("no rank {rank}"))?;
        let ranks = areas.len() as u64;
        let kernels = kernels(program, ranks, |role| service_of(file, role, device))?;
        Lines::new(kernels, device, (rank, areas), area_of(program, ranks)?)
    }

    fn new(
        kernels: HashMap<usize, Function>,
        device: &Device,
        (rank, areas): (usize, &[u64]),
        area: ExchangeArea,
    ) -> Result<Lines> {
        ensure!(
            areas.len() as u64 == area.ranks && rank < areas.len(),
            "areas: expected those of {} ranks, found {} for rank {rank}",
            area.ranks,
            areas.len()
        );
        // A thread waits for others that run at the same time: all blocks of a launch must.
        let fitting = kernels.values().map(|kernel| kernel.blocks_per_multiprocessor(SERVICE_THREADS, 0)).min();
        let fitting = fitting.unwrap_or(0) * device.multiprocessors;
        ensure!(
            u64::from(fitting) >= EXCHANGE_BLOCKS,
            "the kernel that exchanges: expected that {EXCHANGE_BLOCKS} blocks of it run at once, found {fitting} on {}",
            device.name
        );
        let areas = (0..areas.len()).map(|i| areas[(rank + i) % areas.len()]).collect();
        Ok(Lines { kernels, rank, areas, area })
    }

    /// Queues an exchange of parts of the memory at an address, or has it captured: as a dependent launch if told so. All ranks queue the
    /// same ones in the same order.
    ///
    /// # Errors
    /// No kernel for so many parts, an exchange that its area has no room for, or the driver refused.
    pub fn exchange(
        &self,
        kind: Exchange,
        parts: &[Part],
        memory: u64,
        stream: &Stream,
        dependent: bool,
    ) -> Result<()> {
        let kernel = self.kernels.get(&parts.len());
        let kernel =
            kernel.with_context(|| format!("an exchange of {} parts: the plan has no kernel for it", parts.len()))?;
        let sizes: Vec<u64> = parts.iter().map(|part| part.bytes as u64).collect();
        let way = ExchangeWay::of(&sizes);
        let [slots, slot] = [self.area.starts(), self.area.slot_bytes].map(|both| both[usize::from(way.wide)]);
        ensure!(
            way.packets > 0 && sizes.iter().all(|bytes| bytes % 2 == 0) && way.slot_bytes() <= slot,
            "an exchange of {sizes:?} bytes: expected even numbers, not all zero, that take at most {slot} bytes of a slot, found {}",
            way.slot_bytes()
        );
        let listed = parts
            .iter()
            .zip(&sizes)
            .flat_map(|(part, bytes)| [memory + part.from as u64, memory + part.to as u64, *bytes]);
        let ends = [slots, slot, self.rank as u64, u64::from(kind == Exchange::AllToAll), u64::from(way.wide)];
        let args: Vec<Argument> = self.areas.iter().copied().chain(listed).chain(ends).map(Argument::Bits).collect();
        let blocks = match way.wide {
            true => EXCHANGE_BLOCKS,
            false => way.packets.div_ceil(u64::from(SERVICE_THREADS)).min(EXCHANGE_BLOCKS),
        };
        let shape =
            LaunchShape { grid: [blocks as u32, 1, 1], block: SERVICE_THREADS, cluster: 1, shared: 0, dependent };
        Ok(stream.launch(kernel, &shape, &args)?)
    }
}

/// This rank's area and those of the others, mapped.
pub(super) struct Peers {
    // Fields are dropped in order: what is mapped of others before this rank's own.
    lines: Lines,
    _others: Vec<MappedMemory>,
    own: Own,
    /// Beside that of the steps, which may wait for ranks that are no more.
    aside: Stream,
}

/// This rank's area.
enum Own {
    /// Which others have mapped.
    Shared(SharedMemory),
    /// Which nobody has.
    Alone(DeviceMemory),
}

impl Own {
    fn memory(&self) -> &DeviceMemory {
        match self {
            Own::Shared(shared) => shared.memory(),
            Own::Alone(memory) => memory,
        }
    }
}

impl Peers {
    /// Maps the areas of all ranks of a group, in each of them, or in none: then why not. Through these go the program's exchanges of so many
    /// ranks. All ranks call it at the same time.
    ///
    /// # Errors
    /// Another rank is no more, or was told to exchange in another way.
    pub(super) fn join<'k>(
        (program, kernel): (&Program, impl Fn(ServiceRole) -> Result<&'k Function>),
        device: &Arc<Device>,
        group: &mut dyn Group,
        road: Road,
    ) -> Result<Result<Peers, String>> {
        let ranks = group.size() as u64;
        let made = match road {
            Road::Nccl => Err(anyhow!("--exchange nccl")),
            Road::Auto | Road::Peer => Offer::make(program, ranks, device, &kernel),
        };
        let offer = made.as_ref().map_or_else(Offer::none, |(_, offer)| offer.clone());
        let (own, offers) = match (made, agree(group, road, offer)?) {
            (Ok((own, _)), Ok(offers)) => (own, offers),
            (made, agreed) => {
                // Nobody maps what was offered.
                if let Ok((own, _)) = made {
                    own.free();
                }
                return Ok(Err(agreed.err().context("an offer that was not made but told; this is a bug")?));
            }
        };
        let rank = group.rank();
        let mapped = map(&offers, rank, device, &own).and_then(|(others, areas)| {
            let kernels = kernels(program, ranks, |role| kernel(role).cloned())?;
            let lines = Lines::new(kernels, device, (rank, &areas), area_of(program, ranks)?)?;
            Ok(Peers { lines, _others: others, own: Own::Shared(own), aside: Stream::new(device)? })
        });
        Ok(match missing(group, &mapped)? {
            None => Ok(mapped?),
            Some(why) => Err(why),
        })
    }

    /// Of a rank of so many that exchanges with itself: what it sends arrives in the others' place.
    ///
    /// # Errors
    /// The plan has no kernels for it, or the device failed.
    pub(super) fn looped<'k>(
        (program, kernel): (&Program, impl Fn(ServiceRole) -> Result<&'k Function>),
        device: &Arc<Device>,
        (rank, ranks): (usize, usize),
    ) -> Result<Peers> {
        let kernels = kernels(program, ranks as u64, |role| kernel(role).cloned())?;
        let area = area_of(program, ranks as u64)?;
        let own = DeviceMemory::new(device, usize::try_from(area.bytes())?)?;
        let aside = Stream::new(device)?;
        own.fill(0..own.bytes(), 0, &aside)?;
        aside.synchronize()?;
        let lines = Lines::new(kernels, device, (rank, &vec![own.address(); ranks]), area)?;
        Ok(Peers { lines, _others: vec![], own: Own::Alone(own), aside })
    }

    /// What exchanges.
    pub(super) fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Has exchanges that are still on the device wait for nobody any more.
    pub(super) fn give_up(&self) {
        // Where the device has failed, there is nothing that waits.
        let _ = self.own.memory().write(AREA_STOP as usize, &[1, 0, 0, 0], &self.aside);
    }
}

/// The kernels for a program's exchanges of so many ranks, by their parts.
fn kernels(
    program: &Program,
    ranks: u64,
    kernel: impl Fn(ServiceRole) -> Result<Function>,
) -> Result<HashMap<usize, Function>> {
    let by_parts: HashMap<usize, &Collective> =
        exchanges_of(program, ranks).map(|one| (one.parts.len(), one)).collect();
    let found = by_parts.into_iter().map(|(parts, collective)| {
        let size = collective.size;
        let role = exchange_role(collective)
            .with_context(|| format!("the plan has no kernel that exchanges {parts} parts between {size} ranks"))?;
        Ok((parts, kernel(role)?))
    });
    found.collect()
}

/// What a program's exchanges of so many ranks need.
fn area_of(program: &Program, ranks: u64) -> Result<ExchangeArea> {
    ExchangeArea::of(program, ranks).context("the plan has no exchanges")
}

impl Offer {
    /// Allocates this rank's area.
    fn make<'k>(
        program: &Program,
        ranks: u64,
        device: &Arc<Device>,
        kernel: impl Fn(ServiceRole) -> Result<&'k Function>,
    ) -> Result<(SharedMemory, Offer)> {
        kernels(program, ranks, |role| kernel(role).cloned())?;
        let host = host()?;
        let area = area_of(program, ranks)?;
        let own = SharedMemory::new(device, usize::try_from(area.bytes())?)?;
        let prepared = || -> Result<Offer> {
            let stream = Stream::new(device)?;
            own.memory().fill(0..own.memory().bytes(), 0, &stream)?;
            let name = name_of(own.memory())?;
            own.memory().write(AREA_NAME as usize, &name, &stream)?;
            let handle = own.handle()?.to_bytes().to_vec();
            Ok(Offer { fault: None, host: host.clone(), name, handle, ranks: area.ranks, slot_bytes: area.slot_bytes })
        };
        match prepared() {
            Ok(offer) => Ok((own, offer)),
            Err(error) => {
                own.free();
                Err(error)
            }
        }
    }
}

/// Bytes by which memory is known to other processes.
pub(super) const NAME_BYTES: usize = 16;

/// A name for memory of this process that no other has.
pub(super) fn name_of(memory: &DeviceMemory) -> Result<Vec<u8>> {
    let unique = format!("{} {} {} {:?}", host()?, std::process::id(), memory.address(), std::time::SystemTime::now());
    Ok(blake3::hash(unique.as_bytes()).as_bytes()[..NAME_BYTES].to_vec())
}

/// Maps the areas of the others: the mappings, and the addresses of all ranks' areas.
fn map(
    offers: &[Offer],
    rank: usize,
    device: &Arc<Device>,
    own: &SharedMemory,
) -> Result<(Vec<MappedMemory>, Vec<u64>)> {
    let stream = Stream::new(device)?;
    let (mut mapped, mut addresses) = (vec![], vec![]);
    for (other, offer) in offers.iter().enumerate() {
        if other == rank {
            addresses.push(own.memory().address());
            continue;
        }
        let what = || format!("the memory of rank {other} of the group");
        let handle = offer.handle.as_slice().try_into().ok().map(MemoryHandle::from_bytes);
        let bytes = usize::try_from(offer.area().bytes())?;
        let memory = MappedMemory::open(device, handle.with_context(what)?, bytes).with_context(what)?;
        let mut header = [0; AREA_NAME as usize + NAME_BYTES];
        memory.read(0, &mut header, &stream).with_context(what)?;
        ensure!(
            header[AREA_NAME as usize..] == offer.name[..],
            "{}: expected its name at the beginning of what was mapped, found other bytes",
            what()
        );
        addresses.push(memory.address());
        mapped.push(memory);
    }
    Ok((mapped, addresses))
}

/// A name of this host that no other has.
fn host() -> Result<String> {
    const FILE: &str = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(FILE).with_context(|| format!("{FILE}, by which a host is known"))?;
    Ok(id.trim().to_owned())
}
