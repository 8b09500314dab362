//! What a launch reaches is borrowed as its arguments are.

fn main() -> Result<(), uhmm::Error> {
    use uhmm::{Uhmm, args, inout, scope};
    let dev = Uhmm::new()?.device("soft")?;
    let kernel = |_: &uhmm::Ctx<'_>| {};
    let mut node = Box::new([1u64; 2]);
    scope(|scope| {
        scope.launch(&dev, &kernel, 1, args![7u64].reaching([inout(&mut node[..])]));
        node[0] = 2;
    })
}
