pub(crate) mod rabbit;
