//! `--device`: what plans run on; how ranks share GPUs and exchange there.

use std::num::NonZeroUsize;

use clap::ValueEnum;

use crate::cuda;
use crate::plan::{Manifest, Target};
use crate::runtime::cuda::Road;
use crate::runtime::ranks::{Groups, HostRanks};
use crate::runtime::weights::share::Sharing;

/// `--device`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Device {
    /// The GPU if the plan and the machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU executor; runs every plan.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl Device {
    /// Whether a plan runs on a GPU.
    pub fn is_cuda(self, manifest: &Manifest) -> bool {
        match self {
            Device::Cpu => false,
            Device::Cuda => true,
            // Where it cannot run there, the error that says why is more use than a silent CPU.
            Device::Auto => manifest.target != Target::Cpu && manifest.toolkit.is_some() && cuda::Device::count() > 0,
        }
    }
}

/// What the ranks of `mpirun` do on GPUs.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct RankArguments {
    /// How the ranks of `mpirun` exchange what they compute together on GPUs
    #[arg(long, value_enum, default_value_t = Exchange::default())]
    pub exchange: Exchange,
    /// Ranks of `mpirun` that may run on the same GPU, to try plans of more ranks than there are GPUs; slow: kernels that wait for
    /// another rank take turns with it
    #[arg(long, value_name = "N", default_value = "1")]
    pub ranks_per_gpu: NonZeroUsize,
    /// How the ranks of `mpirun` on a host get the weights of a program that several of them run on GPUs
    #[arg(long, value_enum, default_value_t = Weights::default())]
    pub weights: Weights,
}

/// `--weights`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Weights {
    /// As `share` where GPUs reach each other's memory, else as `read`.
    #[default]
    Auto,
    /// Each rank reads the checkpoint.
    Read,
    /// One rank reads, and the others copy what it has over the link between GPUs.
    Share,
}

impl From<Weights> for Sharing {
    fn from(weights: Weights) -> Sharing {
        match weights {
            Weights::Auto => Sharing::Auto,
            Weights::Read => Sharing::Read,
            Weights::Share => Sharing::Share,
        }
    }
}

/// `--exchange`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Exchange {
    /// Through each other's memory where all GPUs are of one host and reach it, else by NCCL.
    #[default]
    Auto,
    /// Through each other's memory, or not at all.
    Peer,
    /// By NCCL.
    Nccl,
}

impl From<Exchange> for Road {
    fn from(exchange: Exchange) -> Road {
        match exchange {
            Exchange::Auto => Road::Auto,
            Exchange::Peer => Road::Peer,
            Exchange::Nccl => Road::Nccl,
        }
    }
}

/// A device, which of the host's GPUs if it is one, and who else runs the plan.
#[derive(Clone)]
pub struct Place {
    /// As asked for.
    pub device: Device,
    /// The GPU's number.
    pub gpu: usize,
    /// Gathers the ranks that run a plan's programs together; none if all of them run in this process.
    pub groups: Option<Groups>,
    /// How their GPUs exchange.
    pub road: Road,
    /// The other ranks of the host; none if this process is the only one.
    pub neighbours: Option<Neighbours>,
}

/// The ranks of a host, which may share weights.
#[derive(Clone)]
pub struct Neighbours {
    /// This rank, of all.
    pub rank: usize,
    /// Those of the host.
    pub host: HostRanks,
    /// Who reads them.
    pub sharing: Sharing,
}

impl From<Device> for Place {
    /// The first GPU, for a process that has them all to itself.
    fn from(device: Device) -> Place {
        Place { device, gpu: 0, groups: None, road: Road::default(), neighbours: None }
    }
}
