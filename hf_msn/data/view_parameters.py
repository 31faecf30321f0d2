"""What is done to a view after it is cut, as one row of numbers: the columns of `view_parameters`."""

# A row is float32. Factors and order have no meaning where the view is not jittered.
FLIP = 0  # 1: left and right are swapped
JITTER = 1  # 1: the four operators of colour jitter are applied
FACTORS = 2  # four columns: brightness, contrast and saturation (1 changes nothing), hue (0 changes nothing)
ORDER = 6  # four columns: which operator comes first, second, third, last; 0 to 3 in the order of the factors
GRAYSCALE = 10  # 1: the view becomes gray
SIGMA = 11  # standard deviation of the blur in pixels; 0: none
NUM_PARAMETERS = 12

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# the blur's kernel reaches this many standard deviations to either side, rounded up to whole pixels
BLUR_REACH = 4
# of red, green and blue in a gray value, as torchvision has them
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
