pub mod rabbit;
