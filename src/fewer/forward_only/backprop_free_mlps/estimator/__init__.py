"""The trainers as a scikit-learn estimator, and the folder that one is kept in."""
