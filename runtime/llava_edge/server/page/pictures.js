// Pictures from files, the clipboard and the camera, as data URIs that the server takes.

const LARGEST_SIDE = 2048;
const LARGEST_BYTES = 3 * 1024 * 1024;
const SENT_AS_THEY_ARE = new Set(["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]);

async function readPicture(file) {
  let bitmap;
  try { bitmap = await createImageBitmap(file); } catch {
    throw new Error(`“${file.name || "The picture"}” can't be read as a picture by this browser.`);
  }
  const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const asItIs = scale === 1 && file.size <= LARGEST_BYTES && SENT_AS_THEY_ARE.has(file.type);
  const url = asItIs ? await dataUrl(file) : drawn(bitmap, scale);
  bitmap.close();
  return { name: file.name || "picture", url };
}

function drawn(source, scale = 1) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round((source.videoWidth ?? source.width) * scale));
  canvas.height = Math.max(1, Math.round((source.videoHeight ?? source.height) * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture can't be read."));
    reader.readAsDataURL(file);
  });
}

const camera = {
  stream: null,
  opening: false,

  // A phone has its own camera app; elsewhere the page shows what the camera sees.
  async open() {
    if (matchMedia("(pointer: coarse)").matches || !navigator.mediaDevices?.getUserMedia) {
      $("snapshot").click();
      return;
    }
    if (this.opening || this.stream) return;
    this.opening = true;
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      warn(error.name === "NotAllowedError" ? "The browser was told not to use the camera." : "No camera was found.");
      return;
    } finally {
      this.opening = false;
    }
    $("viewfinder").srcObject = this.stream;
    $("camera-dialog").showModal();
  },

  take() {
    const video = $("viewfinder");
    if (!video.videoWidth) return;
    attach({ name: "photograph", url: drawn(video) });
    this.close();
  },

  close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    $("viewfinder").srcObject = null;
    $("camera-dialog").close();
  },
};
