//! Clusters of handwritten digits: round after round on a device, where the images and their labels stay. The CPU gets the sums of a round, and makes the centroids of the next from them.
//!
//!     cargo run --release -p uhmm --example k_means            # on soft
//!     cargo run --release -p uhmm --example k_means -- opencl  # the same, in OpenCL C

use uhmm::{Ctx, Forms, Uhmm, args, inout, inp, out};

/// Pixels of an image, clusters, and images of a group.
const DIM: usize = 64;
const CLUSTERS: usize = 10;
const PART: usize = 256;

/// The form in Rust, for `soft`. Each group labels its images (argument 2) and adds them up by label (0, and their numbers 1).
fn label(ctx: &Ctx<'_>) {
    let (images, centroids, halves) = (ctx.inp::<f32>(3), ctx.inp::<f32>(4), ctx.inp::<f32>(5));
    let (sums, counts) = (ctx.out::<f32>(0).chunk(CLUSTERS * DIM), ctx.out::<u32>(1).chunk(CLUSTERS + 1));
    sums.fill(0.0);
    counts.fill(0);
    for (label, image) in ctx.out::<u8>(2).chunk(PART).iter_mut().zip(images[ctx.group() * PART * DIM..].chunks(DIM)) {
        // The nearest centroid c of x has the largest x.c - |c|^2 / 2.
        let score = |j: usize| image.iter().zip(&centroids[j * DIM..]).map(|(x, c)| x * c).sum::<f32>() - halves[j];
        let nearest = (1..CLUSTERS).fold(0, |best, j| if score(j) > score(best) { j } else { best });
        counts[CLUSTERS] += u32::from(*label != nearest as u8); // how many have changed
        *label = nearest as u8;
        counts[nearest] += 1;
        sums[nearest * DIM..][..DIM].iter_mut().zip(image).for_each(|(sum, x)| *sum += x);
    }
}

fn main() -> Result<(), uhmm::Error> {
    // The form in OpenCL C, for OpenCL devices: its name, and the work items of a group.
    let kernel = Forms::new(label).opencl(include_str!("../../cli/src/k_means/k_means.cl"), "k_means", 64);
    let dev = Uhmm::new()?.device(&std::env::args().nth(1).unwrap_or("soft".into()))?;

    // 1797 images of 8 by 8 pixels from 0 to 16, behind the header of a .npy file.
    let file = include_bytes!("../../cli/data/digits.npy");
    let images: Vec<f32> = file[128..].as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let count = images.len() / DIM;
    let groups = count.div_ceil(PART);

    let mut centroids: Vec<f32> = images.chunks(DIM).step_by(count / CLUSTERS).take(CLUSTERS).flatten().copied().collect();
    let (mut sums, mut counts) = (vec![0.0f32; groups * CLUSTERS * DIM], vec![0u32; groups * (CLUSTERS + 1)]);
    let mut labels = vec![u8::MAX; count];
    for round in 1.. {
        let halves: Vec<f32> = centroids.chunks(DIM).map(|c| c.iter().map(|x| x * x / 2.0).sum()).collect();
        let args = args![out(&mut sums), out(&mut counts), inout(&mut labels), inp(&images), inp(&centroids), inp(&halves), PART as u32];
        dev.run(&kernel, groups, args)?;

        // The sums come home by being read; the images and the labels are not touched, and stay.
        let total = |width: usize, at: usize| counts.iter().skip(at).step_by(width).sum::<u32>();
        let (changed, moved) = (total(CLUSTERS + 1, CLUSTERS), dev.stats());
        println!("round {round}: {changed} labels have changed; {} bytes there so far, {} back", moved.bytes_to_device, moved.bytes_to_cpu);
        if changed == 0 {
            break;
        }
        for (at, centroid) in centroids.iter_mut().enumerate() {
            let points = total(CLUSTERS + 1, at / DIM);
            if points > 0 {
                *centroid = sums.iter().skip(at).step_by(CLUSTERS * DIM).sum::<f32>() / points as f32;
            }
        }
    }
    for j in 0..CLUSTERS as u8 {
        let members: Vec<_> = (0..count).filter(|&i| labels[i] == j).map(|i| i.to_string()).collect();
        println!("cluster {j}: {} images, as {}", members.len(), members[..members.len().min(8)].join(", "));
    }
    Ok(())
}
