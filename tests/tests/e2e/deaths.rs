//! kill -9 of any part loses nothing and leaks nothing; `make soak` does this with any two, fifty times.

use ursa_tests::lab::pair::Pair;
use ursa_tests::lab::soak::{self, part};

#[test]
fn each_part_may_die() {
    let mut pair = Pair::allowed().unwrap();
    soak::run(&mut pair, &part::few(), |number, round| println!("{number}: {round:?}")).unwrap();
}
