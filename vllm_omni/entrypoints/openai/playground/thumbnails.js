// Small pictures for the gallery.

const SIDE = 256;

/** A small picture; the picture itself when it is small. */
export async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = SIDE / Math.min(bitmap.width, bitmap.height);
  if (scale >= 0.8) return blob;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob((small) => resolve(small ?? blob), "image/webp", 0.85));
}
