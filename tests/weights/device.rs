//! What a device makes of the spans of a transfer, on the CPU: copies, and the arithmetic of `kernels/include/layout.cuh`.

use lfm2c::plan::{ALIGNMENT, DType, Manifest, ServiceRole, Target};
use lfm2c::runtime::weights::{Origin, Places, Room, Span, Transfer};

use crate::common::{values, written};

/// Elements that the kernel moves as one.
const SOME: u64 = 8;

/// Fills a region by a transfer; tells how many elements were copied, put in their places singly, and as parts of vectors.
pub fn load(manifest: &Manifest, origin: Origin, room: Room, region: &mut [u8]) -> [u64; 3] {
    let program = &manifest.ranks[0];
    let transfer = Transfer::new(manifest, program, origin, room).unwrap();
    let mut memory = vec![0; transfer.part_bytes()];
    let mut moved = [0; 3];
    assert!(memory.len() <= room.part_bytes);
    for part in transfer.parts() {
        // What an earlier part left must not matter.
        memory.fill(0xcc);
        transfer.read(part, &mut memory);
        for span in part {
            let weight = &program.weights[span.weight];
            let to = &mut region[weight.offset as usize..][..weight.ty.bytes().unwrap() as usize];
            let from = &memory[span.bytes()];
            assert!(span.elements > 0 && (span.start as u64).is_multiple_of(ALIGNMENT));
            if span.is_copy {
                let at = (span.places.of(span.first) * span.dtype.bytes()) as usize;
                to[at..][..from.len()].copy_from_slice(from);
                moved[0] += span.elements;
            } else {
                assert!(from.len() <= room.placed_bytes);
                if manifest.target != Target::Cpu {
                    let role = ServiceRole::Place(span.dtype, weight.ty.0);
                    assert!(manifest.services.iter().any(|service| service.0 == role), "{role:?} for {}", weight.name);
                }
                let packed = place(to, weight.ty.0, from, span);
                moved[1] += span.elements - packed;
                moved[2] += packed;
            }
        }
    }
    moved
}

/// The kernel `place`: how many elements it moves in vectors.
fn place(to: &mut [u8], dtype: DType, from: &[u8], span: &Span) -> u64 {
    let from = written(dtype, &values(span.dtype, from));
    let width = dtype.bytes() as usize;
    let mut put = |place: u64, n: u64, elements: u64| {
        let bytes = elements as usize * width;
        to[place as usize * width..][..bytes].copy_from_slice(&from[n as usize * width..][..bytes]);
    };
    let Places { part, whole, run, stride, offset, .. } = span.places;
    // Places count without what the weight does not have of the tensor.
    let first = span.first - span.places.skipped;
    let mut single = 0;
    if [first, part, whole, run, stride, offset].iter().all(|n| n.is_multiple_of(SOME)) {
        let packs = span.elements / SOME;
        let [part, run, begin] = [part, run, first].map(|n| u32::try_from(n / SOME).unwrap());
        for pack in 0..packs {
            let i = begin + pack as u32;
            let rest = i % part;
            let place =
                u64::from(i / part) * whole + u64::from(rest / run) * stride + offset + u64::from(rest % run) * SOME;
            put(place, pack * SOME, SOME);
        }
        single = packs * SOME;
    }
    for n in single..span.elements {
        put(span.places.of(span.first + n), n, 1);
    }
    single
}
