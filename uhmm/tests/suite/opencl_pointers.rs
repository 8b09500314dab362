//! Bare pointers on devices that cannot fetch what they lead to: each stands for the allocation that holds it.

use crate::harness::{self, Pages};
use uhmm::{Ctx, Device, Error, Forms, Kernel, Uhmm, args, inout, out, ptr, scope};
use uhmm_core::conformance::Node;

crate::tests![
    a_pointer_stands_for_its_allocation,
    what_holds_no_allocation_is_refused,
    nobody_else_has_the_allocation_meanwhile,
    pointers_and_nodes
];

const SOURCE: &str = "
__kernel void add(__global uint *data, ulong count, uint more) {
    for (ulong i = 0; i < count; i++) data[i] += more;
}
typedef struct { ulong next, value; } node;
__kernel void follow(__global ulong *sum, __global const node *n, UHMM) {
    ulong total = n->value;
    for (ulong at = n->next; at;) {
        n = uhmm_ptr(at);
        total += n->value;
        at = n->next;
    }
    sum[0] = total;
}
__kernel void both(__global uint *a, __global const uint *b) { a[0] += b[0]; }";

fn add() -> impl Kernel {
    let rust = |ctx: &Ctx<'_>| {
        // SAFETY: whoever launches it says that so many elements are there, and nobody else uses them.
        let data = unsafe { core::slice::from_raw_parts_mut(ctx.pointer::<u32>(0), ctx.value::<u64>(1) as usize) };
        data.iter_mut().for_each(|x| *x += ctx.value::<u32>(2));
    };
    Forms::new(rust).opencl(SOURCE, "add", 1)
}

/// One of each kind: with device faults, without, and without a page table.
fn each_kind(mut f: impl FnMut(&Device)) {
    let hmm = Uhmm::new().unwrap();
    for dev in [hmm.opencl("opencl"), hmm.opencl("opencl:0")].map(|builder| builder.memory(64 << 20).open().unwrap()) {
        f(&dev);
    }
    for kind in ["soft", "soft:nofault", "soft:coherent"] {
        f(&hmm.device(kind).unwrap());
    }
}

fn raise(dev: &Device, at: *mut u32, count: usize) -> Result<(), Error> {
    // SAFETY: the callers' memory, which nobody else uses, or the launch is refused.
    dev.run(&add(), 1, args![unsafe { ptr(at) }, count as u64, 5u32])
}

fn a_pointer_stands_for_its_allocation() {
    each_kind(|dev| {
        // Blocks of any size, their neighbours being others'.
        let mut blocks: Vec<Vec<u32>> = [1, 7, 100, 3000, 30_000, 300_000, 11_000_000].map(|len| vec![1; len]).into();
        for block in &mut blocks {
            let (len, at) = (block.len(), block.as_mut_ptr());
            raise(dev, at, len).unwrap_or_else(|e| panic!("{}: {len}: {e}", dev.name()));
            assert!(block.iter().all(|&x| x == 6), "{}: {len}", dev.name());
        }
        assert!(blocks.iter().flatten().all(|&x| x == 6));
        // From anywhere in a large one, and in a mapping.
        let large = &mut blocks[6];
        raise(dev, &raw mut large[1_000_001], 9_999_999).unwrap();
        assert!(large[..1_000_001].iter().all(|&x| x == 6) && large[1_000_001..].iter().all(|&x| x == 11), "{}", dev.name());
        let mut pages = Pages::new(300 * 4096);
        pages.slice::<u32>().fill(1);
        raise(dev, pages.at(4096 * 100 + 12).cast(), 1000).unwrap_or_else(|e| panic!("{}: {e}", dev.name()));
        let data = pages.slice::<u32>();
        assert!(data[100 * 1024 + 3..][..1000].iter().all(|&x| x == 6) && data.iter().filter(|&&x| x == 6).count() == 1000);
        // In a thread with an arena of its own.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut block = Box::new([1u32; 50]);
                raise(dev, block.as_mut_ptr(), 50).unwrap();
                assert_eq!(*block, [6; 50]);
            });
        });
        let shared = harness::shared(3 * 4096);
        raise(dev, shared[4096..].as_mut_ptr().cast(), 1024).unwrap();
        assert!(shared[..4096].iter().chain(&shared[8192..]).all(|&x| x == 0) && shared[4096..8192].chunks(4).all(|x| x == [5, 0, 0, 0]));
    });
}

fn what_holds_no_allocation_is_refused() {
    static STATIC: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(7);
    let hmm = Uhmm::new().unwrap();
    for kind in ["opencl", "soft:nofault"] {
        let dev = hmm.device(kind).unwrap();
        let refused = |at: *mut u32, words: &str| {
            let error = raise(&dev, at, 1).unwrap_err();
            assert!(matches!(error, Error::Allocation { index: 0, address, .. } if address == at as usize), "{kind}: {error:?}");
            assert!(error.to_string().contains(words), "{kind}: {error}");
        };
        let mut block = vec![1u32; 1000];
        refused(&raw mut block[1], "not what malloc returned");
        refused(&raw mut block[4], "not what malloc returned");
        refused(core::ptr::null_mut(), "nothing is mapped");
        let mut local = 5u32;
        refused(&raw mut local, "stack");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut local = 5u32;
                refused(&raw mut local, "stack");
            });
        });
        refused(STATIC.as_ptr(), "statics");
        assert!(block.iter().all(|&x| x == 1));
        // It is written, so that it must be possible to write there.
        let mut pages = Pages::new(4096);
        pages.slice::<u8>().fill(1);
        // SAFETY: nobody writes there until the protection is back.
        assert_eq!(unsafe { libc::mprotect(pages.start().cast(), 4096, libc::PROT_READ) }, 0);
        let error = raise(&dev, pages.start().cast(), 1).unwrap_err();
        assert!(matches!(error, Error::Protected { index: 0, write: true, .. }), "{kind}: {error}");
        // An argument of its own, of the same allocation.
        let at = block.as_mut_ptr();
        // SAFETY: it is refused.
        let bare = unsafe { ptr(at) };
        let both = Forms::new(|_: &Ctx<'_>| ()).opencl(SOURCE, "both", 1);
        let error = dev.run(&both, 1, args![inout(&mut block[..10]), bare]).unwrap_err();
        assert!(matches!(error, Error::Overlap { first: 0, second: 1, .. }), "{kind}: {error}");
        // Two pointers into one allocation are one.
        // SAFETY: nobody else uses it.
        dev.run(&both, 1, args![unsafe { ptr(at) }, unsafe { ptr(at) }]).unwrap();
        assert!(block[1..].iter().all(|&x| x == 1) && block[0] == if kind == "opencl" { 2 } else { 1 });
    }
    // What is no pointer in OpenCL C.
    let dev = hmm.device("opencl").unwrap();
    let mut block = vec![1u32; 10];
    // SAFETY: it is refused.
    let bare = unsafe { ptr(block.as_mut_ptr()) };
    let error = dev.run(&add(), 1, args![inout(&mut [1u32]), bare, 5u32]).unwrap_err();
    assert!(matches!(error, Error::NotLoaded { .. }) && error.to_string().contains("argument 1"), "{error}");
}

/// The allocation is the launch's: others that use it come before or after.
fn nobody_else_has_the_allocation_meanwhile() {
    let hmm = Uhmm::new().unwrap();
    let (cl, nofault) = (hmm.device("opencl").unwrap(), hmm.device("soft:nofault").unwrap());
    let mut block = vec![0u32; 1_000_000];
    let (at, len) = (block.as_mut_ptr(), block.len() as u64);
    let kernel = add();
    scope(|scope| {
        for _ in 0..10 {
            for dev in [&cl, &nofault] {
                // SAFETY: nobody uses it but these launches.
                scope.launch(dev, &kernel, 1, args![unsafe { ptr(at) }, len, 1u32]);
            }
        }
    })
    .unwrap();
    assert!(block.iter().all(|&x| x == 20), "{}", block[0]);
}

/// The head of a list by a pointer, the rest declared.
fn pointers_and_nodes() {
    let hmm = Uhmm::new().unwrap();
    let rust = |ctx: &Ctx<'_>| {
        let (mut node, mut sum) = (ctx.pointer::<Node>(1).cast_const(), 0);
        while !node.is_null() {
            // SAFETY: the nodes are declared, and live until the launch has ended.
            let here = unsafe { &*node };
            sum += here.value;
            node = if here.next == 0 { core::ptr::null() } else { ctx.ptr(here.next as *const Node) };
        }
        ctx.out::<u64>(0).chunk(1)[0] = sum;
    };
    let kernel = Forms::new(rust).opencl(SOURCE, "follow", 1);
    for kind in ["opencl", "soft:nofault", "soft"] {
        let dev = hmm.device(kind).unwrap();
        let mut nodes: Vec<Box<Node>> = (0..1000).map(|value| Box::new(Node { next: 0, value })).collect();
        for i in 0..999 {
            nodes[i].next = &raw const *nodes[i + 1] as u64;
        }
        let mut sum = [0u64];
        // SAFETY: the list lives, and nobody changes it.
        let head = unsafe { ptr(&raw const *nodes[0]) };
        let each = nodes.iter().map(|node| uhmm::inp(core::slice::from_ref(&**node))); // the head is among them
        dev.run(&kernel, 1, args![out(&mut sum), head].reaching(each)).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(sum[0], 999 * 500, "{kind}");
    }
}
